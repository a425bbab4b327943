"""An API server that refuses, loses answers, and whose watches break, lag, repeat and mix: the end is as without."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from esper_operator.kube.errors import Conflict, Gone, Throttled, Transient

from tests.support.faultyapi import Fault, FaultyApi, GarblingApi
from tests.support.operatorworld import Running, World
from tests.support.virtualtime import run_virtual
from tests.unit.operator.test_worker_killed import (
    Script,
    crashes,
    end_state,
    freezes_and_thaws,
    halts_and_resumes,
    trains,
)

FAULTS = {
    "409": Fault(lambda: Conflict("the object has been modified", code=409)),
    "429": Fault(lambda: Throttled("slow down", retry_after_s=3.0)),
    "500": Fault(lambda: Transient("internal error", code=500)),
    "timeout": Fault(lambda: Transient("no answer"), after=True),
    "410": Fault(lambda: Gone("too old", code=410)),
}
STRETCH = 3
"""So many requests in a row meet the fault."""
Nuisance = Callable[[World], Awaitable[None]]


async def play(
    script: Script, make_api: Callable[[World], FaultyApi], nuisance: Nuisance | None = None
) -> tuple[dict[str, Any], FaultyApi]:
    """The end state, and the API that the operator used."""
    world = World()
    tasks: list[asyncio.Task[None]] = []
    try:
        api = make_api(world)
        running = Running(world, api)
        if nuisance is not None:
            tasks.append(asyncio.create_task(nuisance(world)))
        await script(world)
        await asyncio.sleep(15)
        for task in running.tasks:
            assert not task.done(), task
        await running.cancel()
        return end_state(world), api
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await world.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", [halts_and_resumes, crashes])
@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "410"])
def test_any_requests_may_fail_and_the_end_is_the_same(script: Script, fault: str) -> None:
    expected, plain = run_virtual(play(script, lambda world: FaultyApi(world.api)))
    assert plain.count > 20
    met = 0
    # Each request fails in one or two of the stretches; every other beginning takes half of the time.
    for first in range(1, plain.count + 1, 2):
        found, api = run_virtual(
            play(script, lambda world, at=first: FaultyApi(world.api, FAULTS[fault], first=at, last=at + STRETCH - 1))
        )
        met += len(api.hit)
        assert found == expected, f"{fault} at requests {first} to {first + STRETCH - 1}: {api.hit}"
    print(f"\n{script.__name__}: {fault} at each of {plain.count} requests, {met} in all, same end state")


@pytest.mark.parametrize("script", [trains, halts_and_resumes, freezes_and_thaws, crashes])
@pytest.mark.parametrize("seed", range(5))
def test_watches_may_lag_repeat_and_mix(script: Script, seed: int) -> None:
    expected, _ = run_virtual(play(script, lambda world: FaultyApi(world.api)))
    found, _ = run_virtual(play(script, lambda world: GarblingApi(world.api, seed)))
    assert without_clears(found) == without_clears(expected)


def without_clears(state: dict[str, Any]) -> dict[str, Any]:
    """A halt that is lifted before the caches show that its pods are gone is lifted there too: in vain, harmless."""
    return {**state, "signals": [signal for signal in state["signals"] if not signal[2]]}


async def breaking(world: World) -> None:
    """All streams end, again and again."""
    while True:
        await asyncio.sleep(0.7)
        world.api.break_watches()


async def forgetting(world: World) -> None:
    """All versions are too old, again and again: every watch ends with 410 and lists anew."""
    while True:
        await asyncio.sleep(1.3)
        world.api.forget_history()


@pytest.mark.parametrize("script", [trains, halts_and_resumes, freezes_and_thaws, crashes])
@pytest.mark.parametrize("nuisance", [breaking, forgetting])
def test_watches_may_end_and_forget(script: Script, nuisance: Nuisance) -> None:
    expected, _ = run_virtual(play(script, lambda world: FaultyApi(world.api)))
    found, _ = run_virtual(play(script, lambda world: FaultyApi(world.api), nuisance))
    assert found == expected


def test_a_server_that_is_away_for_a_minute_is_not_hammered_and_found_again_at_once() -> None:
    async def scenario() -> None:
        world = World()
        away = Fault(lambda: Transient("connection refused"))
        try:
            api = FaultyApi(world.api, away, first=10**9, last=10**9)
            running = Running(world, api)
            world.create_run("digits", steps=400)
            await world.until(lambda: world.phase("digits") == "Running")
            before, api._first, api._last = api.count, 0, 10**9
            world.set_spec("digits", emergencyStop="Freeze")
            await asyncio.sleep(60)
            tried = api.count - before
            api._first = 10**9
            await world.until(lambda: world.phase("digits") == "Halted", limit_s=5, what="Halted within 5 s")
            await running.cancel()
        finally:
            await world.close()
        print(f"\n{tried} requests in a minute without an answer")
        assert tried < 400

    run_virtual(scenario())
