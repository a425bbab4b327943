"""An event loop whose clock jumps: sleeping costs nothing and elapsed time is exact.

    def test_something():
        assert run_virtual(scenario()) == ...

Only for code without real I/O: the loop never waits for a socket, it goes on to the next timer.
"""

import asyncio
import heapq
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, start: float = 1_000.0) -> None:
        super().__init__()
        self._virtual_now = start

    def time(self) -> float:
        return self._virtual_now

    def _run_once(self) -> None:
        loop: Any = self
        timers = loop._scheduled
        while timers and timers[0]._cancelled:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            loop._timer_cancelled_count -= 1
        if not loop._ready and timers:
            self._virtual_now = max(self._virtual_now, timers[0].when())
        assert loop._ready or timers or loop._stopping, "everybody waits for something that never comes"
        super()._run_once()  # type: ignore[misc]


def run_virtual(main: Coroutine[Any, Any, T], *, limit_s: float = 3_600.0) -> T:
    """Runs `main` in virtual time; TimeoutError after `limit_s` virtual seconds."""

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await main

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(limited())
