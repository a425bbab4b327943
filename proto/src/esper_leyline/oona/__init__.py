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

from esper_leyline.oona.breaker import Backoff, Breaker, BreakerState
from esper_leyline.oona.client import Entry, Oona, OonaUnavailable, Outcome, Status
from esper_leyline.oona.config import OonaConfig, OonaConfigError
from esper_leyline.oona.streams import MAX_ENTRY_BYTES, REPORTS, TELEMETRY, Stream, signals

__all__ = [
    "MAX_ENTRY_BYTES",
    "REPORTS",
    "TELEMETRY",
    "Backoff",
    "Breaker",
    "BreakerState",
    "Entry",
    "Oona",
    "OonaConfig",
    "OonaConfigError",
    "OonaUnavailable",
    "Outcome",
    "Status",
    "Stream",
    "signals",
]
