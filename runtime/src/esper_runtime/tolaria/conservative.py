"""Conservative mode: training goes on, and whatever is not needed for it rests until what failed has proved itself.

It holds one entry per reason. An entry for something that failed ends when that has succeeded EXIT_SUCCESSES times in
a row, an epoch and MIN_DWELL_S later at the earliest. Being left alone is no success.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

EXIT_SUCCESSES: Final = 2
MIN_DWELL_S: Final = 10.0
MIN_EPOCHS: Final = 1


@dataclass(slots=True)
class Entry:
    """Why the mode is on."""

    message: str
    since: float
    """Of the monotonic clock that the mode was given."""
    epochs: int = 0
    """Boundaries since then."""
    successes: int = 0
    """In a row."""


class Conservative:
    """On while there is any reason for it."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._counted_at = monotonic()
        self.entries: dict[str, Entry] = {}
        """By reason, oldest first; reasons are the names of parts and a few words more, so they are bounded."""

    def __bool__(self) -> bool:
        return bool(self.entries)

    def enter(self, reason: str, message: str) -> None:
        """Again: the entry stays as old as it is, and its successes are gone."""
        entry = self.entries.get(reason)
        if entry is None:
            self.entries[reason] = Entry(message, self._monotonic())
        else:
            entry.successes = 0

    def lift(self, reason: str) -> None:
        """For reasons that are no failures, such as a level or Tamiyo's word."""
        self.entries.pop(reason, None)

    def succeeded(self, reason: str) -> None:
        if reason in self.entries:
            self.entries[reason].successes += 1

    def boundary(self) -> None:
        """An epoch has ended: entries that have served their time end."""
        now = self._monotonic()
        for reason, entry in tuple(self.entries.items()):
            entry.epochs += 1
            proved = entry.successes >= EXIT_SUCCESSES
            if proved and entry.epochs > MIN_EPOCHS and now - entry.since >= MIN_DWELL_S:
                del self.entries[reason]

    def seconds_since_asked(self) -> float:
        """Time that passed since the last call; to be counted by who asks when the mode was on all the while."""
        now = self._monotonic()
        before, self._counted_at = self._counted_at, now
        return now - before
