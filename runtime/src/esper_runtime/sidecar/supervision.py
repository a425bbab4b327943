"""The long-lived parts of a sidecar as named workers: what fails, hangs or ends is noticed and started again.

A worker is a coroutine that never returns. One that fails is started again after 1, 2, 4 … 30 s, lengthened by up to a
quarter at random; 60 s without a failure make it a healthy one, which starts over at 1 s. One that returns has stopped
and stays so. One that gives no sign of life for three of its cadences is cancelled and counts as failed. Five failures
of one worker within ten minutes are a crash loop: then the process ends, so that Kubernetes shows it.

Whoever wants to know is told by an Observer; nothing here knows of metrics or reports.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NoReturn, Protocol, Self

FIRST_BACKOFF_S: Final = 1.0
MAX_BACKOFF_S: Final = 30.0
JITTER: Final = 0.25
"""Of a back-off, at most."""
HEALTHY_S: Final = 60.0
CRASHES: Final = 5
CRASH_WINDOW_S: Final = 600.0
STALE_CADENCES: Final = 3
END_S: Final = 1.5
"""What is cancelled has this long to end."""

log = logging.getLogger(__name__)

Beat = Callable[[], None]
"""Called by a worker to say that it lives."""


class CrashLoop(Exception):
    """A worker fails again and again, or cannot be ended: this process is of no use any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """`cadence_s`: how often it beats at least; None where it may wait for ever."""

    name: str
    run: Callable[[Beat], Coroutine[Any, Any, None]]
    cadence_s: float | None = None


class Observer(Protocol):
    """Told at once, in the event loop; its methods must not wait."""

    def started(self, worker: str, *, again: bool) -> None: ...

    def failed(self, worker: str, why: str, delay_s: float) -> None:
        """It will be started again in `delay_s` seconds."""

    def stopped(self, worker: str) -> None:
        """It returned, and is not started again."""

    def crash_loop(self, worker: str, why: str) -> None:
        """This process is about to end."""


class Restarts:
    """When a worker is started again. Pure: times arrive as arguments, in seconds of one clock."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        """`jitter` gives numbers from 0 to 1."""
        self._jitter = jitter
        self._streak = 0
        self._failures: deque[float] = deque(maxlen=CRASHES)

    def delay_s(self, now: float, lived_s: float) -> float | None:
        """After a failure at `now`; None: a crash loop."""
        self._failures.append(now)
        if len(self._failures) == CRASHES and now - self._failures[0] <= CRASH_WINDOW_S:
            return None
        self._streak = 0 if lived_s >= HEALTHY_S else self._streak
        delay_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(self._streak, 16))
        self._streak += 1
        return delay_s * (1.0 + JITTER * self._jitter())


class _Pulse:
    """Of one worker."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.at = clock()

    def beat(self) -> None:
        self.at = self._clock()


class Workers:
    """Runs them while its context is open::

    async with Workers(parts, observer=...) as workers:
        await workers.until(stop)       # CrashLoop when one cannot be kept alive
        await workers.stop("listener")  # some may have to end before the others
    """

    def __init__(
        self,
        workers: Iterable[Worker],
        *,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._workers = tuple(workers)
        self._observer = observer
        self._clock = clock
        self._jitter = jitter
        self._keepers: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        self._keepers = {
            worker.name: asyncio.create_task(self._keep(worker), name=f"keeper of {worker.name}")
            for worker in self._workers
        }
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(*self._keepers)

    async def until(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set."""
        stopping = asyncio.create_task(stop.wait())
        waiting: set[asyncio.Task[Any]] = {stopping, *self._keepers.values()}
        try:
            while not stopping.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            stopping.cancel()

    async def stop(self, *names: str) -> None:
        """Ends these workers for good. One that does not end in time is left behind and named in the log."""
        keepers = {self._keepers.pop(name) for name in names}
        for keeper in keepers:
            keeper.cancel()
        if keepers:
            _, alive = await asyncio.wait(keepers, timeout=END_S + 0.5)
            for keeper in alive:
                log.error("%s does not end", keeper.get_name())

    async def _keep(self, worker: Worker) -> None:
        restarts = Restarts(self._jitter)
        again = False
        while True:
            began = self._clock()
            self._observer.started(worker.name, again=again)
            why = await self._run(worker)
            if not why:
                log.error("worker %s has returned; it should never", worker.name)
                self._observer.stopped(worker.name)
                return
            now = self._clock()
            delay_s = restarts.delay_s(now, now - began)
            if delay_s is None:
                self._give_up(worker, f"{CRASHES} failures within {CRASH_WINDOW_S:g} s, the last: {why}")
            log.warning("worker %s: %s; it is started again in %.1f s", worker.name, why, delay_s)
            self._observer.failed(worker.name, why, delay_s)
            await asyncio.sleep(delay_s)
            again = True

    def _give_up(self, worker: Worker, why: str) -> NoReturn:
        self._observer.crash_loop(worker.name, why)
        raise CrashLoop(f"worker {worker.name}: {why}")

    async def _run(self, worker: Worker) -> str:
        """Until it ends; why it failed, or nothing when it returned."""
        pulse = _Pulse(self._clock)
        task = asyncio.create_task(worker.run(pulse.beat), name=worker.name)
        try:
            lives = await self._watch(task, worker.cadence_s, pulse)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=END_S)
        if not task.done():
            self._give_up(worker, f"it gave no sign of life and could not be ended within {END_S:g} s")
        if not lives:
            return f"it gave no sign of life for {STALE_CADENCES} times its {worker.cadence_s:g} s"
        if task.cancelled():
            return "it was cancelled"
        error = task.exception()
        if error is None:
            return ""
        log.error("worker %s failed", worker.name, exc_info=error)
        return _described(error)

    async def _watch(self, task: asyncio.Task[None], cadence_s: float | None, pulse: _Pulse) -> bool:
        """Until it is done, or True no more: it is too long since its last beat."""
        if cadence_s is None:
            await asyncio.wait({task})
            return True
        limit_s = STALE_CADENCES * cadence_s
        while True:
            before = self._clock()
            wait_s = max(0.0, pulse.at + limit_s - before)
            await asyncio.wait({task}, timeout=wait_s)
            now = self._clock()
            if task.done():
                return True
            if now - before > wait_s + cadence_s:
                pulse.beat()  # this whole process stood still: nobody could beat
            elif now - pulse.at >= limit_s:
                return False


def _described(error: BaseException) -> str:
    """In one line; of a group, its first error says most."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".splitlines()[0][:256].removesuffix(": ")
