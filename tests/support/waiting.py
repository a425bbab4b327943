"""Waiting for a condition with a deadline, for tests with real processes: never a bare sleep."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

POLL_S = 0.005
PATIENT_S = 40.0
"""Deadline for what takes milliseconds by itself, on a machine that does much else. A test that passes never waits
for it."""


async def until(check: Callable[[], Any | Awaitable[Any]], timeout_s: float = PATIENT_S, what: str = "") -> Any:
    """Polls `check` (plain or async) until it is true and returns its value; AssertionError at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = check()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or check}"
        await asyncio.sleep(POLL_S)


def until_sync(check: Callable[[], Any], timeout_s: float = PATIENT_S, what: str = "") -> Any:
    """`until` for tests without an event loop."""
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or check}"
        time.sleep(POLL_S)
    return found
