"""A telemetry packet in the words of OpenTelemetry: each of its events a log record, all records of a run together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from esper_leyline.incidents import FIELD
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import MessagePriority
from esper_leyline.v1.telemetry_pb2 import TelemetryEvent, TelemetryLevel, TelemetryPacket
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, SeverityNumber

SERVICE: Final = "esper"
SCOPE: Final = "esper.run"
_SEVERITIES: Final = {
    TelemetryLevel.TELEMETRY_LEVEL_INFO: (SeverityNumber.SEVERITY_NUMBER_INFO, "INFO"),
    TelemetryLevel.TELEMETRY_LEVEL_WARNING: (SeverityNumber.SEVERITY_NUMBER_WARN, "WARNING"),
    TelemetryLevel.TELEMETRY_LEVEL_ERROR: (SeverityNumber.SEVERITY_NUMBER_ERROR, "ERROR"),
    TelemetryLevel.TELEMETRY_LEVEL_CRITICAL: (SeverityNumber.SEVERITY_NUMBER_FATAL, "CRITICAL"),
}


@dataclass(frozen=True, slots=True)
class Item:
    """A packet and what it came in."""

    envelope: BusEnvelope
    packet: TelemetryPacket

    @property
    def priority(self) -> str:
        return MessagePriority.Name(self.envelope.priority).removeprefix("MESSAGE_PRIORITY_")


def request(items: Sequence[Item]) -> bytes:
    """A serialized ExportLogsServiceRequest."""
    made = ExportLogsServiceRequest()
    for run_uid in dict.fromkeys(item.envelope.run_uid for item in items):
        resource = made.resource_logs.add()
        resource.resource.attributes.extend(_attributes({"service.name": SERVICE, "esper.run.uid": run_uid}))
        scope = resource.scope_logs.add()
        scope.scope.name = SCOPE
        scope.log_records.extend(_records(item for item in items if item.envelope.run_uid == run_uid))
    return made.SerializeToString()


def _records(items: Iterable[Item]) -> Iterable[LogRecord]:
    return (_record(item, event) for item in items for event in item.packet.events)


def _record(item: Item, event: TelemetryEvent) -> LogRecord:
    packet = item.packet
    number, text = _SEVERITIES.get(event.level, (SeverityNumber.SEVERITY_NUMBER_UNSPECIFIED, ""))
    return LogRecord(
        time_unix_nano=packet.timestamp.ToNanoseconds(),
        observed_time_unix_nano=item.envelope.issued_at.ToNanoseconds(),
        severity_number=number,
        severity_text=text,
        event_name=event.name,
        body=AnyValue(string_value=event.description),
        attributes=_attributes(
            {
                "event.name": event.name,
                "esper.event.id": event.event_id,
                "esper.source": packet.source_subsystem,
                "esper.priority": item.priority,
                "esper.nonce": item.envelope.nonce.hex(),
                f"esper.{FIELD}": item.envelope.correlation_id,
            }
        ),
    )


def _attributes(given: dict[str, str]) -> list[KeyValue]:
    """Without the empty ones."""
    return [KeyValue(key=key, value=AnyValue(string_value=value)) for key, value in given.items() if value]
