"""The streams of the fabric. Each has a channel of the same name, so that a listener needs no reading position."""

from dataclasses import dataclass
from typing import Final

from esper_leyline import signing

FIELD: Final = b"e"
"""Field of a stream entry that holds the serialized BusEnvelope."""

MAX_ENTRY_BYTES: Final = signing.MAX_PAYLOAD + 4096
"""Of a serialized envelope; larger ones are not sent, and are not parsed when received."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    name: str
    max_length: int
    """Entries kept; the oldest go first."""
    exact: bool = False
    """Trim to exactly max_length. Otherwise Redis may keep some entries more, which costs it less."""
    idle_seconds: int | None = None
    """The stream disappears when nothing was added for so long. None: it stays."""


REPORTS: Final = Stream(name="esper.reports", max_length=10_000)
TELEMETRY: Final = Stream(name="esper.telemetry", max_length=10_000)

_MONTH_S: Final = 30 * 24 * 3600


def signals(run_uid: str) -> Stream:
    """Emergency signals of one run. Ends a month after the last one: the ConfigMap is the durable record, and the
    streams of runs long gone must not fill Redis."""
    return Stream(name=f"esper.signals.{run_uid}", max_length=100, exact=True, idle_seconds=_MONTH_S)
