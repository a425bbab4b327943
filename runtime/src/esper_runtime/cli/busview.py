"""What `esper bus` shows of messages, streams and dead letters."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from esper_leyline.oona import STREAMS, Entry, Kept, Oona, Stream, signals
from esper_leyline.oona.client import entries_of
from esper_leyline.signing import SignatureError, Verifier
from esper_leyline.v1 import common_pb2 as pb
from esper_leyline.v1.blueprint_pb2 import (
    KernelArtifactError,
    KernelArtifactReady,
    KernelCatalogUpdate,
    KernelPrefetchRequest,
)
from esper_leyline.v1.bus_pb2 import BusEnvelope, DeadLetterReason
from esper_leyline.v1.command_pb2 import SignedCommand
from esper_leyline.v1.emergency_pb2 import EmergencySignal
from esper_leyline.v1.learning_pb2 import FieldReport, PolicyUpdate
from esper_leyline.v1.report_pb2 import RunReport
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket, TelemetryPacket
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message
from redis.asyncio import Redis

from esper_runtime.cli.output import Format, document, duration, table

SIGNALS: Final = signals("").name
PREFIX: Final = "oona."
_TIMEOUT_S: Final = 5.0
_CUT: Final = 60

PAYLOADS: Final[Mapping[int, type[Message]]] = {
    pb.BUS_MESSAGE_TYPE_SYSTEM_STATE: SystemStatePacket,
    pb.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND: SignedCommand,
    pb.BUS_MESSAGE_TYPE_FIELD_REPORT: FieldReport,
    pb.BUS_MESSAGE_TYPE_TELEMETRY: TelemetryPacket,
    pb.BUS_MESSAGE_TYPE_POLICY_UPDATE: PolicyUpdate,
    pb.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_REQUEST: KernelPrefetchRequest,
    pb.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_READY: KernelArtifactReady,
    pb.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_ERROR: KernelArtifactError,
    pb.BUS_MESSAGE_TYPE_KERNEL_CATALOG_UPDATE: KernelCatalogUpdate,
    pb.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL: EmergencySignal,
    pb.BUS_MESSAGE_TYPE_RUN_REPORT: RunReport,
    pb.BUS_MESSAGE_TYPE_EMERGENCY_ACK: RunReport,
}
"""An acknowledgement travels as a report."""

Row = dict[str, Any]

MESSAGE_COLUMNS = ("ID", "AGE", "TYPE", "PRIORITY", "RUN")
MESSAGE_WIDE = ("KEY", "SIGNATURE", "BYTES", "CORRELATION")
STREAM_COLUMNS = ("STREAM", "LENGTH", "NEWEST", "GROUP", "PENDING", "LAG", "CONSUMERS")
LETTER_COLUMNS = ("ID", "AGE", "REASON", "STREAM", "ATTEMPTS", "DETAIL")
LETTER_WIDE = ("GROUP", "CONSUMER", "ENTRY", "TYPE", "RUN")


def stream_of(name: str) -> Stream | None:
    """By its name, with or without `oona.`; None for none of ours."""
    full = name if name.startswith(PREFIX) else f"{PREFIX}{name}"
    if full.startswith(SIGNALS) and full != SIGNALS:
        return signals(full.removeprefix(SIGNALS))
    return STREAMS.get(full)


# Messages


def message(entry: Entry, now_ms: int, verifier: Verifier | None = None, *, whole: bool = True) -> Row:
    """One entry, decoded. `whole`: with the payload."""
    row: Row = {"id": entry.id, "age": round(max(0, now_ms - entry.order[0]) / 1e3, 3), "bytes": len(entry.raw)}
    envelope = entry.envelope()
    if envelope is None:
        return {**row, "type": "UNDECODABLE"}
    return {**row, **_envelope(envelope, verifier, whole=whole)}


def _envelope(envelope: BusEnvelope, verifier: Verifier | None, *, whole: bool) -> Row:
    row: Row = {
        "type": _name(pb.BusMessageType, envelope.message_type, "BUS_MESSAGE_TYPE_"),
        "priority": _name(pb.MessagePriority, envelope.priority, "MESSAGE_PRIORITY_"),
        "runUid": envelope.run_uid,
        "keyId": envelope.key_id,
        "signature": _signature(envelope, verifier),
    }
    if envelope.correlation_id:
        row["correlationId"] = envelope.correlation_id
    if envelope.HasField("issued_at"):
        row["issuedAt"] = envelope.issued_at.ToJsonString()
    if whole:
        row["payload"] = _payload(envelope)
    return row


def _signature(envelope: BusEnvelope, verifier: Verifier | None) -> str:
    if not envelope.signature:
        return "missing_signature"
    if verifier is None:
        return "unchecked"
    try:
        verifier.check_envelope(envelope)
    except SignatureError as error:
        return error.reason
    return "valid"


def _payload(envelope: BusEnvelope) -> Any:
    """As JSON would have it; None when it is not what its type says."""
    kind = PAYLOADS.get(envelope.message_type)
    if kind is None:
        return None
    found = kind()
    try:
        found.ParseFromString(envelope.payload)
    except DecodeError:
        return None
    return MessageToDict(found)


def _name(kind: Any, value: int, prefix: str) -> str:
    try:
        return str(kind.Name(value)).removeprefix(prefix)
    except ValueError:
        return str(value)


def message_cells(row: Row, *, wide: bool) -> list[str]:
    cells = [row["id"], duration(int(row["age"])), row["type"], row.get("priority", ""), row.get("runUid", "")]
    if wide:
        cells += [row.get("keyId", ""), row.get("signature", ""), str(row["bytes"]), row.get("correlationId", "")]
    return cells


def messages(rows: Sequence[Row], form: Format) -> str:
    if form is Format.NAME:
        return "\n".join(row["id"] for row in rows)
    if form in (Format.JSON, Format.YAML):
        return document(list(rows), form)
    wide = form is Format.WIDE
    return table([message_cells(r, wide=wide) for r in rows], (*MESSAGE_COLUMNS, *(MESSAGE_WIDE if wide else ())))


WIDTHS = (20, 6, 22, 8, 36)


def line(row: Row, form: Format) -> str:
    """One message as it comes: whoever follows a stream cannot wait for the width of what is to come."""
    if form is Format.NAME:
        return str(row["id"])
    if form is Format.JSON:
        return json.dumps(row, ensure_ascii=False)
    if form is Format.YAML:
        return f"---\n{document(row, form)}"
    return aligned(message_cells(row, wide=form is Format.WIDE))


def aligned(cells: Sequence[str]) -> str:
    widths = (*WIDTHS, *(17 for _ in cells[len(WIDTHS) :]))
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()


def heading(form: Format) -> str:
    """Above followed messages; empty where there is none."""
    if form not in (Format.TABLE, Format.WIDE):
        return ""
    return aligned([*MESSAGE_COLUMNS, *(MESSAGE_WIDE if form is Format.WIDE else ())])


# Streams


async def now_ms(oona: Oona, client: Redis) -> int:
    """Redis's own time, which entries are named after."""
    seconds, microseconds = await oona.ask(client.time(), _TIMEOUT_S)
    return int(seconds) * 1000 + int(microseconds) // 1000


async def newest(oona: Oona, client: Redis, stream: Stream, count: int) -> list[Entry]:
    """Oldest of them first."""
    found = await oona.ask(client.xrevrange(stream.name, count=count), _TIMEOUT_S)
    return list(reversed(entries_of(found)))


async def state(oona: Oona, client: Redis, stream: Stream, now: int) -> Row:
    """Length, newest entry and groups of a stream; changes nothing."""
    if not await oona.ask(client.exists(stream.name), _TIMEOUT_S):
        return {"stream": stream.name, "length": 0, "groups": []}
    length = int(await oona.ask(client.xlen(stream.name), _TIMEOUT_S))
    last = entries_of(await oona.ask(client.xrevrange(stream.name, count=1), _TIMEOUT_S))
    groups = []
    for group in await oona.ask(client.xinfo_groups(stream.name), _TIMEOUT_S):
        name = group["name"].decode(errors="replace")
        consumers = await oona.ask(client.xinfo_consumers(stream.name, name), _TIMEOUT_S)
        groups.append({
            "name": name,
            "pending": int(group["pending"]),
            "lag": group.get("lag"),
            "lastDelivered": group["last-delivered-id"].decode(),
            "consumers": [
                {"name": one["name"].decode(errors="replace"), "pending": one["pending"], "idleMs": one["idle"]}
                for one in consumers
            ],
        })  # fmt: skip
    found: Row = {"stream": stream.name, "length": length, "groups": groups}
    if last:
        found |= {"newest": last[0].id, "newestAge": round(max(0, now - last[0].order[0]) / 1e3, 3)}
    return found


def streams(rows: Sequence[Row], form: Format) -> str:
    if form is Format.NAME:
        return "\n".join(row["stream"] for row in rows)
    if form in (Format.JSON, Format.YAML):
        return document(list(rows), form)
    return table([cells for row in rows for cells in _stream_cells(row)], STREAM_COLUMNS)


def _stream_cells(row: Row) -> Iterable[list[str]]:
    age = duration(int(row["newestAge"])) if "newestAge" in row else ""
    head = [row["stream"], str(row["length"]), age]
    if not row["groups"]:
        yield [*head, "", "", "", ""]
    for group in row["groups"]:
        lag = "?" if group["lag"] is None else str(group["lag"])
        yield [*head, group["name"], str(group["pending"]), lag, str(len(group["consumers"]))]
        head = ["", "", ""]


def consumers(row: Row) -> str:
    """Who is in the groups of one stream."""
    rows = [
        [group["name"], one["name"], str(one["pending"]), duration(int(one["idleMs"] / 1000))]
        for group in row["groups"]
        for one in group["consumers"]
    ]
    return table(rows, ("GROUP", "CONSUMER", "PENDING", "IDLE")) if rows else ""


# Dead letters


def letter(kept: Kept, verifier: Verifier | None = None, *, whole: bool = False) -> Row:
    found = kept.letter
    row: Row = {
        "id": kept.id,
        "reason": _name(DeadLetterReason, found.reason, "DEAD_LETTER_REASON_"),
        "detail": found.detail,
        "stream": found.stream,
        "entryId": found.entry_id,
        "group": found.group,
        "consumer": found.consumer,
        "attempts": found.delivery_attempts,
    }
    if found.HasField("given_up_at"):
        row["givenUpAt"] = found.given_up_at.ToJsonString()
    envelope = Entry(found.entry_id, found.envelope).envelope()
    if envelope is not None:
        row["message"] = {"bytes": len(found.envelope), **_envelope(envelope, verifier, whole=whole)}
    return row


def letters(rows: Sequence[Row], form: Format) -> str:
    if form is Format.NAME:
        return "\n".join(row["id"] for row in rows)
    if form in (Format.JSON, Format.YAML):
        return document(list(rows), form)
    now, wide = datetime.now(UTC), form is Format.WIDE
    return table(
        [_letter_cells(row, now, wide=wide) for row in rows], (*LETTER_COLUMNS, *(LETTER_WIDE if wide else ()))
    )


def _letter_cells(row: Row, now: datetime, *, wide: bool) -> list[str]:
    age = ""
    if "givenUpAt" in row:
        age = duration(max(0, int((now - datetime.fromisoformat(row["givenUpAt"])).total_seconds())))
    detail = row["detail"] if wide or len(row["detail"]) <= _CUT else f"{row['detail'][: _CUT - 3]}..."
    cells = [row["id"], age, row["reason"], row["stream"], str(row["attempts"]), " ".join(detail.split())]
    if wide:
        inner = row.get("message", {})
        cells += [row["group"], row["consumer"], row["entryId"], inner.get("type", ""), inner.get("runUid", "")]
    return cells


REASONS = tuple(name.removeprefix("DEAD_LETTER_REASON_") for name in DeadLetterReason.keys()[1:])
