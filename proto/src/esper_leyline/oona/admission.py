"""What is let onto the fabric while it is crowded. Pure: clocks and levels arrive as arguments.

Back-pressure is decided at the source and never redirects. CRITICAL always passes; control messages are refused rather
than dropped, so that their sender tries again; LOW goes before NORMAL. HIGH telemetry has a rate on the emergency
stream, beyond which it goes to the ordinary one with its priority kept; CRITICAL telemetry has a far higher one, beyond
which it is counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from esper_leyline.v1 import common_pb2 as pb

SOFT_DEPTH: Final = 4_000
HIGH_DEPTH: Final = 8_000
RECOVERY_DEPTH: Final = 1_000
"""A level falls when the backlog is below this, and CALM_S after it rose."""
CALM_S: Final = 60.0
HIGH_PER_MINUTE: Final = 120
CRITICAL_PER_MINUTE: Final = 1_000

_CONTROL: Final = frozenset(
    {
        pb.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND,
        pb.BUS_MESSAGE_TYPE_POLICY_UPDATE,
        pb.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_REQUEST,
        pb.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_READY,
        pb.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_ERROR,
        pb.BUS_MESSAGE_TYPE_KERNEL_CATALOG_UPDATE,
        pb.BUS_MESSAGE_TYPE_FIELD_REPORT,
    }
)
_ALWAYS: Final = frozenset(
    {
        pb.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL,
        pb.BUS_MESSAGE_TYPE_EMERGENCY_ACK,
        pb.BUS_MESSAGE_TYPE_RUN_REPORT,  # it has its own log behind it, which bounds what is sent
    }
)


class Pressure(StrEnum):
    """Of one stream."""

    NONE = "none"
    SOFT = "soft"
    """Every other LOW message is dropped."""
    HIGH = "high"
    """LOW and NORMAL telemetry is dropped, control messages are refused."""

    @property
    def level(self) -> float:
        """oona.backpressure.level."""
        return _LEVELS[self]


_LEVELS: Final = {Pressure.NONE: 0.0, Pressure.SOFT: 0.5, Pressure.HIGH: 1.0}


class PressureGauge:
    """Turns the backlog of one stream into its pressure: rises at once, falls late."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = 0.0
        self.pressure = Pressure.NONE

    def see(self, depth: int) -> Pressure:
        found = Pressure.HIGH if depth >= HIGH_DEPTH else Pressure.SOFT if depth >= SOFT_DEPTH else Pressure.NONE
        now = self._clock()
        if found.level > self.pressure.level:
            self.pressure, self._since = found, now
        elif depth < RECOVERY_DEPTH and self.pressure is not Pressure.NONE and now - self._since >= CALM_S:
            self.pressure = Pressure.NONE
        return self.pressure


class Verdict(StrEnum):
    ADMIT = "admit"
    DEMOTE = "demote"
    """To the ordinary telemetry stream, with its priority."""
    DROP = "drop"
    REFUSE = "refuse"
    """The sender keeps it and tries again."""
    COALESCE = "coalesce"
    """Too much CRITICAL telemetry: not sent, and counted."""


@dataclass(slots=True)
class _Bucket:
    """Tokens that refill evenly, up to a minute's worth."""

    per_minute: int
    clock: Callable[[], float]
    tokens: float = 0.0
    at: float = 0.0

    def __post_init__(self) -> None:
        self.tokens, self.at = float(self.per_minute), self.clock()

    def take(self) -> bool:
        now = self.clock()
        self.tokens = min(float(self.per_minute), self.tokens + max(0.0, now - self.at) * self.per_minute / 60.0)
        self.at = now
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


class Admission:
    """Of one sender."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        high_per_minute: int = HIGH_PER_MINUTE,
        critical_per_minute: int = CRITICAL_PER_MINUTE,
    ) -> None:
        self._high = _Bucket(high_per_minute, clock)
        self._critical = _Bucket(critical_per_minute, clock)
        self._odd = False
        self.coalesced = 0
        """CRITICAL telemetry that was over the cap."""

    @property
    def tokens(self) -> float:
        """Left for HIGH telemetry on the emergency stream."""
        return self._high.tokens

    def judge(
        self, message_type: pb.BusMessageType, priority: pb.MessagePriority, pressure: Callable[[], Pressure]
    ) -> Verdict:
        """`pressure`: of the stream that the message would go to."""
        if message_type in _ALWAYS:
            return Verdict.ADMIT
        if message_type == pb.BUS_MESSAGE_TYPE_TELEMETRY:
            return self._telemetry(priority, pressure)
        if priority == pb.MESSAGE_PRIORITY_CRITICAL or pressure() is not Pressure.HIGH:
            return Verdict.ADMIT
        return Verdict.REFUSE if message_type in _CONTROL else Verdict.DROP

    def _telemetry(self, priority: pb.MessagePriority, pressure: Callable[[], Pressure]) -> Verdict:
        if priority == pb.MESSAGE_PRIORITY_CRITICAL:
            if self._critical.take():
                return Verdict.ADMIT
            self.coalesced += 1
            return Verdict.COALESCE
        if priority == pb.MESSAGE_PRIORITY_HIGH:
            return Verdict.ADMIT if self._high.take() else Verdict.DEMOTE
        now = pressure()
        if now is Pressure.HIGH:
            return Verdict.DROP
        if now is Pressure.SOFT and priority == pb.MESSAGE_PRIORITY_LOW:
            self._odd = not self._odd
            return Verdict.DROP if self._odd else Verdict.ADMIT
        return Verdict.ADMIT
