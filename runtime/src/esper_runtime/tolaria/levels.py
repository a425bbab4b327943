"""The emergency level of a run: 0 none, 1 notice, 2 elevated, 3 conservative, 4 halt.

Up at once and to any level, by what happens. Down by health alone, one level at a time: each level asks for so many
healthy boundaries in a row and so many seconds of the run since its last cause. Level 4 is never left. Pure; whoever
holds it writes changes into the log and tells them.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from esper_leyline.reasons import RunReason
from esper_leyline.v1.emergency_pb2 import EmergencyLevel

NONE: Final = EmergencyLevel.EMERGENCY_LEVEL_UNSPECIFIED
NOTICE: Final = EmergencyLevel.EMERGENCY_LEVEL_NOTICE
ELEVATED: Final = EmergencyLevel.EMERGENCY_LEVEL_ELEVATED
CONSERVATIVE: Final = EmergencyLevel.EMERGENCY_LEVEL_CONSERVATIVE
HALT: Final = EmergencyLevel.EMERGENCY_LEVEL_HALT

MAX_MESSAGE_BYTES: Final = 256
FAILED_WINDOW: Final = 5
FAILED_FOR_ELEVATED: Final = 2
FAILED_FOR_HALT: Final = 3
AGGREGATE_S: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Leave:
    """What has to be true before a level is left downwards."""

    healthy: int
    seconds: float
    breakers_closed: bool = False


LEAVE: Final[dict[int, Leave]] = {
    NOTICE: Leave(healthy=3, seconds=0.0),
    ELEVATED: Leave(healthy=5, seconds=60.0),
    CONSERVATIVE: Leave(healthy=10, seconds=300.0, breakers_closed=True),
}


class LevelError(ValueError):
    """A level or text that is none; the message names value and limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """From one level to another."""

    id: str
    before: int
    after: int
    reason: RunReason
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """Causes that changed nothing, told together."""

    count: int
    message: str
    """Of the newest."""


def name_of(level: int) -> str:
    """In lower case, for people."""
    return "none" if level == NONE else EmergencyLevel.Name(level).removeprefix("EMERGENCY_LEVEL_").lower()


class Levels:
    """`seconds` is the run's own clock, `new_id` gives an id per change."""

    def __init__(self, level: int, *, seconds: Callable[[], float], new_id: Callable[[], str]) -> None:
        self.level = level
        self.owed_to: Change | None = None
        """The change that led here; None when that was in an earlier process."""
        self._seconds = seconds
        self._new_id = new_id
        self._healthy = 0
        self._since = seconds()
        self._recent: deque[bool] = deque(maxlen=FAILED_WINDOW)
        self._streak: deque[str] = deque(maxlen=FAILED_FOR_HALT)
        self._repeats = 0
        self._repeat_message = ""
        self._told_at = seconds()

    def cause(self, level: int, reason: RunReason, message: str) -> Change | None:
        """Something that calls for `level`. The change, when it is above the present one. LevelError: not valid."""
        if level not in (NOTICE, ELEVATED, CONSERVATIVE, HALT):
            raise LevelError(f"emergency level {level}; it must be from {NOTICE} to {HALT}")
        size = len(message.encode())
        if not message or size > MAX_MESSAGE_BYTES:
            raise LevelError(f"the reason of an emergency level has {size} bytes; give 1 to {MAX_MESSAGE_BYTES}")
        self._healthy = 0
        if level < self.level:
            return None
        self._since = self._seconds()
        if level == self.level:
            self._repeats += 1
            self._repeat_message = message
            return None
        return self._move(level, reason, message)

    def boundary(self, *, healthy: bool | None, failure: str = "", breakers_closed: bool) -> Change | None:
        """After each boundary. `healthy` None: neither, as when nobody could be asked. `failure`: its kind, if any."""
        self._recent.append(bool(failure))
        if failure:
            self._streak.append(failure)
            return self._failed_boundary()
        if healthy is None:
            return None
        self._healthy = self._healthy + 1 if healthy else 0
        if not healthy:
            return None
        self._streak.clear()
        return self._down(breakers_closed)

    def _failed_boundary(self) -> Change | None:
        if len(self._streak) == FAILED_FOR_HALT:
            kinds = ", ".join(self._streak)
            message = f"{FAILED_FOR_HALT} failed boundaries without a healthy one between them: {kinds}"
            return self.cause(HALT, RunReason.BOUNDARY_FAILED, message)
        failed = sum(self._recent)
        if failed >= FAILED_FOR_ELEVATED:
            message = f"{failed} of the last {len(self._recent)} boundaries failed"
            return self.cause(ELEVATED, RunReason.BOUNDARY_FAILED, message)
        self._healthy = 0
        return None

    def _down(self, breakers_closed: bool) -> Change | None:
        leave = LEAVE.get(self.level)
        if leave is None or self._healthy < leave.healthy or self._seconds() - self._since < leave.seconds:
            return None
        if leave.breakers_closed and not breakers_closed:
            return None
        message = f"{self._healthy} healthy boundaries"
        return self._move(self.level - 1, RunReason.EMERGENCY_LEVEL_LOWERED, message)

    def begin_again(self, message: str) -> Change | None:
        """A new pod or attempt lifts a halt; anything less stays."""
        return self._move(NONE, RunReason.EMERGENCY_LEVEL_LOWERED, message) if self.level == HALT else None

    def _move(self, level: int, reason: RunReason, message: str) -> Change:
        change = Change(id=self._new_id(), before=self.level, after=level, reason=reason, message=message)
        self.level, self.owed_to = level, change
        self._healthy, self._since = 0, self._seconds()
        self._repeats, self._told_at = 0, self._since
        return change

    def repeats(self) -> Repeats | None:
        """Causes of the present level since they were told last, at most every AGGREGATE_S seconds."""
        now = self._seconds()
        if not self._repeats or now - self._told_at < AGGREGATE_S:
            return None
        told = Repeats(count=self._repeats, message=self._repeat_message)
        self._repeats, self._told_at = 0, now
        return told


def cut(message: str) -> str:
    """At most MAX_MESSAGE_BYTES of UTF-8, for texts of our own making."""
    return message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")
