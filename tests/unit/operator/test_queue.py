"""The work queue in virtual time."""

import asyncio

from esper_operator.queue import MAX_RETRY_S, URGENT_IN_A_ROW, WorkQueue

from tests.support.virtualtime import run_virtual


def queue() -> WorkQueue[str]:
    return WorkQueue(jitter=lambda: 0.5)


def test_a_key_added_many_times_is_given_out_once():
    async def scenario() -> list[str]:
        q = queue()
        for key in ("a", "b", "a", "a"):
            q.add(key)
        return [await q.get(), await q.get()] + ([await q.get()] if len(q) else [])

    assert run_virtual(scenario()) == ["a", "b"]


def test_a_busy_key_is_not_given_to_a_second_worker():
    async def scenario() -> None:
        q = queue()
        q.add("a")
        assert await q.get() == "a"
        q.add("a")
        second = asyncio.create_task(q.get())
        await asyncio.sleep(1)
        assert not second.done()
        q.done("a")
        assert await second == "a"

    run_virtual(scenario())


def test_of_several_delays_the_earliest_counts():
    async def scenario() -> float:
        q, loop = queue(), asyncio.get_running_loop()
        started = loop.time()
        q.add_after("a", 10)
        q.add_after("a", 3)
        q.add_after("a", 7)
        await q.get()
        assert q.next_timer_s() is None
        return loop.time() - started

    assert run_virtual(scenario()) == 3


def test_an_add_replaces_the_timer():
    async def scenario() -> None:
        q = queue()
        q.add_after("a", 10)
        q.add("a")
        q.done(await q.get())
        await asyncio.sleep(60)
        assert q.idle

    run_virtual(scenario())


def test_retries_double_up_to_the_cap_and_start_afresh_after_a_success():
    async def scenario() -> list[float]:
        q = queue()
        delays = []
        for _ in range(14):
            delays.append(round(q.retry("a"), 3))
            q.done(await q.get())
        assert delays[-1] == MAX_RETRY_S
        q.succeeded("a")
        return [*delays[:4], round(q.retry("a"), 3)]

    assert run_virtual(scenario()) == [0.05, 0.1, 0.2, 0.4, 0.05]


def test_jitter_is_twenty_percent_at_most():
    async def scenario() -> tuple[float, float]:
        low, high = WorkQueue[str](jitter=lambda: 0.0), WorkQueue[str](jitter=lambda: 1.0)
        return low.retry("a"), high.retry("a")

    low, high = run_virtual(scenario())
    assert (round(low, 6), round(high, 6)) == (0.04, 0.06)


def test_a_forgotten_key_leaves_nothing_behind():
    async def scenario() -> None:
        q = queue()
        q.retry("a")
        q.forget("a")
        await asyncio.sleep(100)
        assert q.idle
        assert q.next_timer_s() is None
        assert not q._failures

    run_virtual(scenario())


def test_ages_tell_who_waits_and_who_works_longest():
    async def scenario() -> None:
        q = queue()
        q.add("a")
        await asyncio.sleep(2)
        q.add("b")
        await asyncio.sleep(3)
        assert q.oldest_s() == 5
        assert await q.get() == "a"
        await asyncio.sleep(4)
        assert q.longest_work_s() == 4
        assert q.oldest_s() == 7

    run_virtual(scenario())


def test_a_closed_queue_gives_nothing_out_but_lets_work_end():
    async def scenario() -> None:
        q = queue()
        q.add("a")
        q.add("b")
        await q.get()
        q.close()
        waiting = asyncio.create_task(q.get())
        idle = asyncio.create_task(q.wait_idle())
        await asyncio.sleep(1)
        assert not waiting.done()
        assert not idle.done()
        q.done("a")
        await idle
        assert not waiting.done()
        waiting.cancel()

    run_virtual(scenario())


def test_workers_never_share_a_key_and_lose_no_wake_up():
    async def scenario() -> tuple[int, set[str]]:
        q = queue()
        busy: set[str] = set()
        seen: set[str] = set()
        overlaps = 0

        async def worker() -> None:
            nonlocal overlaps
            while True:
                key = await q.get()
                overlaps += key in busy
                busy.add(key)
                await asyncio.sleep(0.01)
                seen.add(key)
                busy.discard(key)
                q.done(key)

        workers = [asyncio.create_task(worker()) for _ in range(8)]
        for round_ in range(20):
            for n in range(10):
                q.add(f"{n}")
                q.add_after(f"late-{round_ % 3}-{n}", 0.005 * n)
            await asyncio.sleep(0.003)
        await asyncio.sleep(5)
        assert q.idle
        for w in workers:
            w.cancel()
        return overlaps, seen

    overlaps, seen = run_virtual(scenario())
    assert overlaps == 0
    assert len(seen) == 40


def test_urgent_keys_come_first_also_those_that_waited_already():
    async def scenario() -> list[str]:
        q = queue()
        for key in ("a", "b", "c"):
            q.add(key)
        q.add("d", urgent=True)
        q.add("b", urgent=True)
        q.add("d")
        return [await q.get() for _ in range(4)]

    assert run_virtual(scenario()) == ["d", "b", "a", "c"]


def test_a_key_that_becomes_urgent_while_it_is_worked_on_comes_first_after_that():
    async def scenario() -> list[str]:
        q = queue()
        q.add("a")
        first = await q.get()
        q.add("b")
        q.add("a", urgent=True)
        q.done(first)
        order = [await q.get(), await q.get()]
        for key in order:
            q.done(key)
        assert q.idle
        q.add("b")
        q.add("a")  # its hurry was for once
        return [*order, await q.get()]

    assert run_virtual(scenario()) == ["a", "b", "b"]


def test_urgent_keys_without_end_do_not_keep_the_others_waiting_for_ever():
    async def scenario() -> int:
        q = queue()
        q.add("ordinary")
        for turn in range(1000):
            q.add(f"urgent-{turn}", urgent=True)
            q.add(f"urgent-{turn}-too", urgent=True)
            if await q.get() == "ordinary":
                return turn
        raise AssertionError("never")

    assert run_virtual(scenario()) == URGENT_IN_A_ROW


async def take_later(q: WorkQueue[str], delay_s: float) -> str:
    await asyncio.sleep(delay_s)
    return await q.get()


def test_calm_is_when_no_urgent_key_waits_or_patience_ends():
    async def scenario() -> list[float]:
        q, loop = queue(), asyncio.get_running_loop()
        began, ends = loop.time(), []
        q.add("ordinary")
        await q.wait_calm(10)
        ends.append(loop.time() - began)
        q.add("a", urgent=True)
        taken = asyncio.create_task(take_later(q, 1))
        await q.wait_calm(10)
        ends.append(loop.time() - began)
        assert await taken == "a"
        q.add("b", urgent=True)
        await q.wait_calm(10)
        return [*ends, loop.time() - began]

    assert run_virtual(scenario()) == [0, 1, 11]
