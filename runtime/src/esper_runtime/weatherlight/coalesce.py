"""Repetitions told together, so that a flood says no more than a few packets and loses none of it. Pure.

What is worse, or merely other, always passes at once: only an event that equals one of the last WINDOW_NS in writer,
name, level and words is held back, counted, and told with its count when the window of the first one is over.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

WINDOW_NS: Final = 200_000_000
MAX_KINDS: Final = 64
"""Different events watched for repetitions at one time; more pass one by one."""

T = TypeVar("T")


@dataclass(slots=True)
class Repeated(Generic[T]):
    """Events like one that was passed, and since when they have been held back."""

    since_ns: int
    """Of the one that was passed."""
    count: int = 0
    first: T | None = None
    newest: T | None = None


class Coalescer(Generic[T]):
    """Times are those of the events, by one monotonic clock."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, Repeated[T]] = {}

    def passes(self, kind: Hashable, event: T, at_ns: int) -> bool:
        """False: it is counted, and comes with `due`."""
        held = self._kinds.get(kind)
        if held is None or not 0 <= at_ns - held.since_ns < WINDOW_NS:
            if held is None and len(self._kinds) < MAX_KINDS:
                self._kinds[kind] = Repeated(at_ns)
            elif held is not None and not held.count:
                held.since_ns = at_ns
            return True
        held.count += 1
        held.newest = event
        held.first = held.first or event
        return False

    def due(self, now_ns: int) -> list[Repeated[T]]:
        """Those whose window is over; they are forgotten here."""
        over = [kind for kind, held in self._kinds.items() if not 0 <= now_ns - held.since_ns < WINDOW_NS]
        ended = [self._kinds.pop(kind) for kind in over]
        return [held for held in ended if held.count]

    def first(self) -> list[T]:
        """Of each kind that is held back, its oldest event."""
        return [held.first for held in self._kinds.values() if held.first is not None]
