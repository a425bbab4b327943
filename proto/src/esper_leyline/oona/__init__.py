"""Oona, the message fabric: signed envelopes over Redis streams and channels, with everything bounded.

Redis is an untrusted and optional transport. A message counts by its signature alone, which the receiver checks; a
dead Redis costs the sender one timeout and is an outcome, never an exception; a reader waits for Redis to come back
and goes on where it was.

    async with Oona(OonaConfig(url="redis://localhost:6379")) as oona:
        outcome = await oona.publish_report(envelope)
        if outcome.status is not Status.PUBLISHED: ...  # keep it, send it again
        async for entry in oona.reports(after_id="0-0"):
            envelope = entry.envelope()  # None: no BusEnvelope
"""

from esper_leyline.oona.admission import Admission, Pressure
from esper_leyline.oona.breaker import Backoff, Breaker, BreakerState
from esper_leyline.oona.client import Entry, Oona, OonaDenied, OonaRefused, OonaUnavailable, Outcome, Status
from esper_leyline.oona.config import OonaConfig, OonaConfigError
from esper_leyline.oona.consumer import Consumer, ConsumerOptions, ConsumerStats, Delivery, Done, Rejected, RetryLater
from esper_leyline.oona.deadletter import Kept, ReplayError, dead_letter, dead_letters, replay
from esper_leyline.oona.examine import MAX_SKEW_S, Examination, examine
from esper_leyline.oona.housekeeping import Housekeeper, StreamState
from esper_leyline.oona.publisher import Publisher
from esper_leyline.oona.streams import (
    DEAD_LETTERS,
    EMERGENCY,
    KERNEL_ERRORS,
    KERNEL_READY,
    KERNEL_REQUESTS,
    MAX_ENTRY_BYTES,
    NORMAL,
    POLICY,
    REPORTS,
    STREAMS,
    TELEMETRY,
    Stream,
    route,
    signals,
)

__all__ = [
    "DEAD_LETTERS",
    "EMERGENCY",
    "KERNEL_ERRORS",
    "KERNEL_READY",
    "KERNEL_REQUESTS",
    "MAX_ENTRY_BYTES",
    "MAX_SKEW_S",
    "NORMAL",
    "POLICY",
    "REPORTS",
    "STREAMS",
    "TELEMETRY",
    "Admission",
    "Backoff",
    "Breaker",
    "BreakerState",
    "Consumer",
    "ConsumerOptions",
    "ConsumerStats",
    "Delivery",
    "Done",
    "Entry",
    "Examination",
    "Housekeeper",
    "Kept",
    "Oona",
    "OonaConfig",
    "OonaConfigError",
    "OonaDenied",
    "OonaRefused",
    "OonaUnavailable",
    "Outcome",
    "Pressure",
    "Publisher",
    "Rejected",
    "ReplayError",
    "RetryLater",
    "Status",
    "Stream",
    "StreamState",
    "dead_letter",
    "dead_letters",
    "examine",
    "replay",
    "route",
    "signals",
]
