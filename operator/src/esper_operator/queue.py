"""The work queue: each key at most once, one reconcile per key at a time, retries with growing pauses.

Urgent keys come first, but not for ever: after so many of them in a row an ordinary one has its turn.
Not thread-safe: everything happens in one event loop. Every operation is O(1), or O(log n) for timers.
"""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")

BASE_RETRY_S = 0.05
MAX_RETRY_S = 60.0
JITTER = 0.2
URGENT_IN_A_ROW = 32


@dataclass(slots=True)
class _Timer:
    at: float
    handle: asyncio.TimerHandle


class WorkQueue(Generic[K]):
    def __init__(self, *, jitter: Callable[[], float] = random.random) -> None:
        """`jitter` gives numbers from 0 to 1."""
        self._jitter = jitter
        self._ready: OrderedDict[K, None] = OrderedDict()
        self._urgent: OrderedDict[K, None] = OrderedDict()
        self._hurry: set[K] = set()
        """Dirty keys that are urgent."""
        self._in_a_row = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self._since: dict[K, float] = {}
        """Dirty keys and when they became so; those that are busy are neither in `_ready` nor in `_urgent`."""
        self._busy: dict[K, float] = {}
        self._timers: dict[K, _Timer] = {}
        self._failures: dict[K, int] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self.on_add: Callable[[], None] = lambda: None
        self.on_retry: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        """Keys that wait for a worker."""
        return len(self._since)

    def oldest_s(self) -> float:
        """How long the key that waits longest has waited; 0 when none does."""
        now = _now()
        return max((now - since for since in self._since.values()), default=0.0)

    def longest_work_s(self) -> float:
        now = _now()
        return max((now - since for since in self._busy.values()), default=0.0)

    def add(self, key: K, *, urgent: bool = False) -> None:
        """Makes the key due now. A timer for it is dropped: what it was for is seen by this reconcile."""
        self._cancel(key)
        if key not in self._since:
            self.on_add()
            self._since[key] = _now()
        elif not urgent or key in self._hurry:
            return
        if urgent:
            self._hurry.add(key)
        if key not in self._busy:
            self._line_up(key)

    def add_after(self, key: K, delay_s: float) -> None:
        """Makes the key due later; of several delays the earliest counts."""
        if delay_s <= 0:
            self.add(key)
            return
        if key in self._since:
            return
        loop = asyncio.get_running_loop()
        at = loop.time() + delay_s
        known = self._timers.get(key)
        if known is not None:
            if known.at <= at:
                return
            known.handle.cancel()
        self._timers[key] = _Timer(at, loop.call_at(at, self.add, key))

    def retry(self, key: K) -> float:
        """Makes the key due after a pause that doubles with each failure in a row; returns that pause."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        self.on_retry()
        delay = min(BASE_RETRY_S * 2.0 ** min(failures, 30), MAX_RETRY_S) * (1 + JITTER * (2 * self._jitter() - 1))
        self.add_after(key, delay)
        return delay

    def succeeded(self, key: K) -> None:
        self._failures.pop(key, None)

    def forget(self, key: K) -> None:
        """Drops timers and failures of a key that is no more."""
        self._cancel(key)
        self._failures.pop(key, None)

    async def get(self) -> K:
        """The next key; `done` must follow. Waits for ever once the queue is closed."""
        while self._closed or not (self._ready or self._urgent):
            self._wake.clear()
            await self._wake.wait()
        key = self._first()
        del self._since[key]
        self._hurry.discard(key)
        self._busy[key] = _now()
        self._idle.clear()
        return key

    def done(self, key: K) -> None:
        """Ends the work on a key; one that became dirty meanwhile is due again."""
        del self._busy[key]
        if not self._busy:
            self._idle.set()
        if key in self._since:
            self._line_up(key)

    def close(self) -> None:
        """Gives no more keys out; what is being worked on may be finished."""
        self._closed = True

    async def wait_calm(self, at_most_s: float) -> None:
        """Returns when no urgent key waits for a worker, or after that time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._calm.wait()

    async def wait_idle(self) -> None:
        """Returns when no key is being worked on."""
        await self._idle.wait()

    @property
    def idle(self) -> bool:
        """Nothing is due and nothing is being worked on (timers may run)."""
        return not self._since and not self._busy

    def next_timer_s(self) -> float | None:
        """Until the first timer; None without one."""
        first = min((timer.at for timer in self._timers.values()), default=None)
        return None if first is None else max(first - _now(), 0.0)

    def _line_up(self, key: K) -> None:
        if key in self._hurry:
            self._ready.pop(key, None)
            self._urgent[key] = None
            self._calm.clear()
        else:
            self._ready[key] = None
        self._wake.set()

    def _first(self) -> K:
        urgent = bool(self._urgent) and (self._in_a_row < URGENT_IN_A_ROW or not self._ready)
        self._in_a_row = self._in_a_row + 1 if urgent else 0
        key = (self._urgent if urgent else self._ready).popitem(last=False)[0]
        if not self._urgent:
            self._calm.set()
        return key

    def _cancel(self, key: K) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.handle.cancel()


def _now() -> float:
    return asyncio.get_running_loop().time()
