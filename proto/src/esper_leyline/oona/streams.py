"""The streams of the fabric and what goes where. Each has a channel of the same name, so that a listener needs no
reading position.

A message's stream follows from its type and the priority that its producer gave it, and from nothing else: no state of
the fabric ever sends it elsewhere. What is said twice (an emergency on its run's own stream and on the common one) is
so in one transaction.
"""

from dataclasses import dataclass
from typing import Final

from esper_leyline import signing
from esper_leyline.v1 import common_pb2 as pb

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
    retention_s: int = 900
    """Entries older than that go, once every group has acknowledged them."""


_MONTH_S: Final = 30 * 24 * 3600

REPORTS: Final = Stream(name="oona.reports", max_length=10_000)
"""RunReports, from the pods to the operator, who reads from where its status ends: no group."""
NORMAL: Final = Stream(name="oona.normal", max_length=10_000)
"""State packets, commands and field reports, for who learns from them."""
TELEMETRY: Final = Stream(name="oona.telemetry", max_length=10_000)
EMERGENCY: Final = Stream(name="oona.emergency", max_length=10_000)
"""Emergencies of all runs, and telemetry that is HIGH or CRITICAL."""
POLICY: Final = Stream(name="oona.policy", max_length=1_000, exact=True)
KERNEL_REQUESTS: Final = Stream(name="oona.kernels.requests", max_length=4_096)
KERNEL_READY: Final = Stream(name="oona.kernels.ready", max_length=4_096)
KERNEL_ERRORS: Final = Stream(name="oona.kernels.errors", max_length=4_096)
DEAD_LETTERS: Final = Stream(name="oona.deadletter", max_length=10_000, retention_s=_MONTH_S)

STREAMS: Final = {
    stream.name: stream
    for stream in (
        REPORTS,
        NORMAL,
        TELEMETRY,
        EMERGENCY,
        POLICY,
        KERNEL_REQUESTS,
        KERNEL_READY,
        KERNEL_ERRORS,
        DEAD_LETTERS,
    )
}
"""All but those of a single run."""

_BY_TYPE: Final = {
    pb.BUS_MESSAGE_TYPE_SYSTEM_STATE: NORMAL,
    pb.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND: NORMAL,
    pb.BUS_MESSAGE_TYPE_FIELD_REPORT: NORMAL,
    pb.BUS_MESSAGE_TYPE_POLICY_UPDATE: POLICY,
    pb.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_REQUEST: KERNEL_REQUESTS,
    pb.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_READY: KERNEL_READY,
    pb.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_ERROR: KERNEL_ERRORS,
    pb.BUS_MESSAGE_TYPE_KERNEL_CATALOG_UPDATE: KERNEL_READY,
    pb.BUS_MESSAGE_TYPE_RUN_REPORT: REPORTS,
    pb.BUS_MESSAGE_TYPE_EMERGENCY_ACK: REPORTS,
}
_URGENT: Final = frozenset({pb.MESSAGE_PRIORITY_HIGH, pb.MESSAGE_PRIORITY_CRITICAL})


def signals(run_uid: str) -> Stream:
    """Emergency signals of one run. Ends a month after the last one: the ConfigMap is the durable record, and the
    streams of runs long gone must not fill Redis."""
    return Stream(name=f"oona.signals.{run_uid}", max_length=100, exact=True, idle_seconds=_MONTH_S)


def route(message_type: pb.BusMessageType, priority: pb.MessagePriority, run_uid: str) -> tuple[Stream, ...]:
    """Where a message belongs. ValueError for one without priority, and for a type that does not travel."""
    if priority == pb.MESSAGE_PRIORITY_UNSPECIFIED or priority not in pb.MessagePriority.values():
        raise ValueError("a message needs a priority: its producer sets it, once")
    if message_type == pb.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL:
        return signals(run_uid), EMERGENCY
    if message_type == pb.BUS_MESSAGE_TYPE_TELEMETRY:
        return (EMERGENCY if priority in _URGENT else TELEMETRY,)
    stream = _BY_TYPE.get(message_type)
    if stream is None:
        raise ValueError(f"messages of type {message_type} do not travel on the bus")
    return (stream,)
