"""Both clocks at once. Order and durations use the monotonic one; the wall clock is for people."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True)
class Moment:
    monotonic_ns: int
    """CLOCK_MONOTONIC, the same in every container of the pod."""
    time: datetime


Clock = Callable[[], Moment]


def system_clock() -> Moment:
    return Moment(time.monotonic_ns(), datetime.now(UTC))
