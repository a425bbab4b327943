"""Values of reports cut to what the resource admits: a runtime must not be able to make its own status unwritable."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime

from esper_leyline.reasons import RunReason
from google.protobuf.timestamp_pb2 import Timestamp

from esper_operator.api.runstatus import MAX_MESSAGE

MAX_COUNT = 2**53
"""JSON readers keep integers exact up to here."""
MAX_REASON = 128
MAX_INCIDENT = 64
_REASONS: Mapping[str, RunReason] = {reason.value: reason for reason in RunReason}


def count(value: float) -> int:
    """A number that is not negative, as an integer. Not finite reads as 0."""
    return min(max(int(value), 0), MAX_COUNT) if math.isfinite(value) else 0


def nearest(value: float) -> int:
    """The nearest integer that is not negative."""
    return count(value + 0.5)


def decimal(value: float) -> str:
    """Six significant digits; NaN, Infinity and -Infinity by name."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return f"{value:.6g}"


def percentage(share: float) -> int:
    """0 to 100 of a share from 0 to 1."""
    return min(100, count(share * 100))


def message(text: str) -> str:
    return text[:MAX_MESSAGE]


def reason(text: str, default: RunReason) -> RunReason:
    """A member of the common list; anything else reads as `default`."""
    return _REASONS.get(text, default)


def milliseconds(time: datetime) -> datetime:
    """UTC, cut to whole milliseconds."""
    utc = time.astimezone(UTC)
    return utc.replace(microsecond=utc.microsecond // 1000 * 1000)


def seconds(time: datetime) -> datetime:
    """UTC, cut to whole seconds, as Kubernetes writes its own times."""
    return time.astimezone(UTC).replace(microsecond=0)


def moment(stamp: Timestamp, default: datetime) -> datetime:
    """The time in `stamp`; `default` where it is unset or no time at all."""
    if stamp.seconds == 0 and stamp.nanos == 0:
        return default
    try:
        return milliseconds(stamp.ToDatetime(tzinfo=UTC))
    except (ValueError, OverflowError):
        return default
