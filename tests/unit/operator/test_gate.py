"""The order of writes towards the API server."""

import asyncio

import pytest
from esper_operator.kube.gate import Gate

from tests.support.virtualtime import run_virtual


async def write(gate: Gate, rank: int, name: str, done: list[str]) -> None:
    async with gate.place(rank):
        done.append(name)
        await asyncio.sleep(1)


def test_the_lowest_rank_goes_first_and_equal_ones_in_their_order():
    async def scenario() -> list[str]:
        gate, done = Gate(1), []
        ranks = {"status": 2, "event": 3, "record": 0, "touch": 1, "second record": 0}
        await asyncio.gather(*(write(gate, rank, name, done) for name, rank in ranks.items()))
        return done

    assert run_virtual(scenario()) == ["status", "record", "second record", "touch", "event"]


def test_no_more_than_the_places_are_under_way():
    async def scenario() -> float:
        gate, loop = Gate(3), asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(write(gate, 0, "", []) for _ in range(10)))
        return loop.time() - began

    assert run_virtual(scenario()) == 4


@pytest.mark.parametrize("late", [False, True], ids=["while it waits", "as its turn comes"])
def test_who_gives_up_takes_no_place_along(late: bool):
    async def scenario() -> list[str]:
        gate, done = Gate(1), []
        async with gate.place(0):
            tasks = [asyncio.create_task(write(gate, 0, name, done)) for name in ("gives up", "next")]
            await asyncio.sleep(0.5)
            if not late:
                tasks[0].cancel()
        tasks[0].cancel()  # late: the place is its own already, and it does not know yet
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(10):
            await write(gate, 0, "after", done)
        return done

    assert run_virtual(scenario()) == ["next", "after"]
