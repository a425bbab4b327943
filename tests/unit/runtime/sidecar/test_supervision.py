"""Workers are started again, later each time, and given up when that does not help; all in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from esper_runtime.sidecar.supervision import (
    CRASH_WINDOW_S,
    CRASHES,
    HEALTHY_S,
    MAX_BACKOFF_S,
    Beat,
    CrashLoop,
    Restarts,
    Worker,
    Workers,
)

from tests.support.virtualtime import run_virtual

Run = Callable[[Beat], Coroutine[Any, Any, None]]


class Heard:
    """What an observer was told, with the seconds since the start."""

    def __init__(self) -> None:
        self.began = asyncio.get_running_loop().time()
        self.told: list[tuple[float, str, str]] = []
        self.delays: list[float] = []

    def note(self, kind: str, detail: str = "") -> None:
        self.told.append((round(asyncio.get_running_loop().time() - self.began, 3), kind, detail))

    def times(self, kind: str) -> list[float]:
        return [at for at, found, _ in self.told if found == kind]

    def reasons(self, kind: str) -> list[str]:
        return [detail for _, found, detail in self.told if found == kind]

    def started(self, worker: str, *, again: bool) -> None:
        self.note("restarted" if again else "started", worker)

    def failed(self, worker: str, why: str, delay_s: float) -> None:
        self.delays.append(round(delay_s, 3))
        self.note("failed", why)

    def stopped(self, worker: str) -> None:
        self.note("stopped", worker)

    def crash_loop(self, worker: str, why: str) -> None:
        self.note("crash loop", why)


def watch(run: Run, *, seconds: float, cadence_s: float | None = None, jitter: float = 0.0) -> Heard:
    """What becomes of a worker within so many seconds, beside one that is always well."""

    async def scenario() -> Heard:
        heard = Heard()
        loop = asyncio.get_running_loop()
        parts = (Worker(name="tried", run=run, cadence_s=cadence_s), Worker(name="well", run=forever))
        stop = asyncio.Event()
        loop.call_later(seconds, stop.set)
        with suppress(CrashLoop):
            async with Workers(parts, observer=heard, clock=loop.time, jitter=lambda: jitter) as workers:
                await workers.until(stop)
        heard.note("ended")
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
        return heard

    return run_virtual(scenario(), limit_s=100_000)


async def forever(_: Beat) -> None:
    await asyncio.Event().wait()


def after(*lives: float) -> Run:
    """A worker that fails after so many seconds, one life after the other, and then lives on."""
    left = list(lives)

    async def run(_: Beat) -> None:
        if not left:
            await forever(_)
        await asyncio.sleep(left.pop(0))
        raise ValueError("broken\nin two lines")

    return run


def test_back_off_doubles_from_one_second_to_thirty():
    restarts = Restarts(lambda: 0.0)
    found = [restarts.delay_s(number * CRASH_WINDOW_S, 0.0) for number in range(8)]
    assert found == [1, 2, 4, 8, 16, 30, 30, MAX_BACKOFF_S]


def test_jitter_lengthens_by_a_quarter_at_most():
    assert Restarts(lambda: 1.0).delay_s(0.0, 0.0) == 1.25
    assert Restarts(lambda: 0.5).delay_s(0.0, 0.0) == 1.125


def test_a_minute_without_a_failure_starts_over():
    restarts = Restarts(lambda: 0.0)
    assert [restarts.delay_s(n * CRASH_WINDOW_S, HEALTHY_S - 0.1) for n in range(3)] == [1, 2, 4]
    assert restarts.delay_s(4 * CRASH_WINDOW_S, HEALTHY_S) == 1


def test_five_failures_within_ten_minutes_are_a_crash_loop_and_four_or_slower_ones_are_not():
    quick, slow = Restarts(lambda: 0.0), Restarts(lambda: 0.0)
    assert [quick.delay_s(n * CRASH_WINDOW_S / 4, 0.0) is None for n in range(CRASHES)] == [False] * 4 + [True]
    assert None not in [slow.delay_s(n * (CRASH_WINDOW_S / 4 + 0.1), 0.0) for n in range(20)]


def test_a_worker_that_fails_is_told_and_started_again():
    heard = watch(after(5.0, 0.0), seconds=30)
    assert heard.reasons("failed") == ["ValueError: broken"] * 2
    assert heard.delays == [1.0, 2.0]
    assert heard.times("restarted") == [6.0, 8.0]
    assert heard.times("ended") == [30.0]


def test_a_worker_that_returns_has_stopped_and_the_others_go_on():
    async def brief(_: Beat) -> None:
        await asyncio.sleep(3)

    heard = watch(brief, seconds=100)
    assert heard.told[2:] == [(3.0, "stopped", "tried"), (100.0, "ended", "")]


def test_a_crash_loop_ends_the_whole():
    heard = watch(after(*[0.0] * 100), seconds=1000)
    assert heard.times("failed") == [0, 1, 3, 7]
    assert heard.times("crash loop") == heard.times("ended") == [15.0]
    assert "5 failures within 600 s, the last: ValueError: broken" in heard.reasons("crash loop")[0]


def test_whoever_waits_learns_of_the_crash_loop():
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        parts = [Worker(name="tried", run=after(*[0.0] * 100))]
        async with Workers(parts, observer=Heard(), clock=loop.time, jitter=lambda: 0.0) as workers:
            await workers.until(asyncio.Event())

    with pytest.raises(CrashLoop, match="worker tried: 5 failures"):
        run_virtual(scenario())


def test_a_worker_without_a_sign_of_life_for_three_cadences_is_started_again():
    lives = 0

    async def hangs_once(beat: Beat) -> None:
        nonlocal lives
        lives += 1
        while True:
            beat()
            await asyncio.sleep(10_000 if lives == 1 else 2)

    heard = watch(hangs_once, seconds=100, cadence_s=2)
    assert heard.reasons("failed") == ["it gave no sign of life for 3 times its 2 s"]
    assert heard.times("failed") == [6.0]
    assert lives == 2


def test_one_that_beats_now_and_then_lives():
    async def slow(beat: Beat) -> None:
        while True:
            await asyncio.sleep(5.9)
            beat()

    assert watch(slow, seconds=500, cadence_s=2).times("failed") == []


def test_when_the_whole_process_stood_still_nobody_is_blamed():
    """As after SIGSTOP, or a node that was asleep: the clock has jumped and nobody could beat."""

    async def scenario() -> Heard:
        loop = asyncio.get_running_loop()
        heard = Heard()
        asleep_s = 0.0

        async def steady(beat: Beat) -> None:
            while True:
                beat()
                await asyncio.sleep(1)

        async def late(_: Beat) -> None:
            nonlocal asleep_s
            await asyncio.sleep(10.5)
            asleep_s = 500.0
            await asyncio.Event().wait()

        stop = asyncio.Event()
        loop.call_later(60, stop.set)
        parts = [Worker(name="steady", run=steady, cadence_s=1), Worker(name="sleep", run=late)]
        async with Workers(parts, observer=heard, clock=lambda: loop.time() + asleep_s, jitter=lambda: 0.0) as workers:
            await workers.until(stop)
        return heard

    assert run_virtual(scenario()).times("failed") == []


def test_one_that_cannot_be_ended_ends_the_process():
    async def stubborn(_: Beat) -> None:
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(5)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        parts = [Worker(name="stubborn", run=stubborn, cadence_s=1)]
        async with Workers(parts, observer=Heard(), clock=loop.time, jitter=lambda: 0.0) as workers:
            try:
                await workers.until(asyncio.Event())
            finally:
                for task in asyncio.all_tasks():
                    if task.get_name() == "stubborn":
                        task.get_coro().close()  # type: ignore[union-attr]

    with pytest.raises(CrashLoop, match="could not be ended"):
        run_virtual(scenario())


def test_some_can_be_stopped_before_the_others():
    async def scenario() -> list[str]:
        ended: list[str] = []

        def run(name: str) -> Run:
            async def wait(_: Beat) -> None:
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.append(name)

            return wait

        loop = asyncio.get_running_loop()
        parts = [Worker(name=name, run=run(name)) for name in ("a", "b", "c")]
        async with Workers(parts, observer=Heard(), clock=loop.time) as workers:
            stop = asyncio.Event()
            stop.set()
            await workers.until(stop)
            await asyncio.sleep(0)
            await workers.stop("b")
            assert ended == ["b"]
        return ended

    assert sorted(run_virtual(scenario())) == ["a", "b", "c"]
