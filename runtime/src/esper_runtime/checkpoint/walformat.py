"""The log's bytes: 256-byte headers, each linked to the one before, with a JSON payload behind it."""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c

from esper_runtime.checkpoint.errors import CheckpointError
from esper_runtime.checkpoint.walstate import Kind

MAGIC = b"ESPERWAL"
VERSION = 2
HEADER_BYTES = 256
MAX_PAYLOAD = 1024 * 1024

_FIELDS = struct.Struct("<8sHHIQQQII")  # magic, version, kind, length, sequence, monotonic, wall, payload, previous
_CRC = struct.Struct("<I")
_CODES = {kind: code for code, kind in enumerate(Kind, start=1)}
_BY_CODE = {code: kind for kind, code in _CODES.items()}


class WalError(CheckpointError):
    """A record that cannot be written, or a log that this version cannot read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record that verifies."""

    kind: Kind
    fields: dict[str, Any]
    sequence: int
    monotonic_ns: int
    wall_ns: int
    crc: int
    """Of its header; the next record names it."""
    end: int
    """Offset of the byte behind it."""


def encode(
    kind: Kind, fields: Mapping[str, Any], *, sequence: int, previous: int, monotonic_ns: int, wall_ns: int
) -> tuple[bytes, int]:
    """A record's bytes and its CRC."""
    payload = json.dumps(fields, sort_keys=True, allow_nan=False).encode()
    if len(payload) > MAX_PAYLOAD:
        raise WalError(f"record {kind} has {len(payload)} bytes; at most {MAX_PAYLOAD}")
    head = _FIELDS.pack(
        MAGIC, VERSION, _CODES[kind], len(payload), sequence, monotonic_ns, wall_ns, crc32c.crc32c(payload), previous
    ).ljust(HEADER_BYTES - _CRC.size, b"\0")
    crc = crc32c.crc32c(head)
    return head + _CRC.pack(crc) + payload, crc


def records(data: bytes, path: Path) -> Iterator[Record]:
    """Those that verify, up to the first that does not. WalError when a newer release wrote them."""
    offset, sequence, previous = 0, 0, 0
    while (header := data[offset : offset + HEADER_BYTES]) and len(header) == HEADER_BYTES:
        head, crc = header[: -_CRC.size], _CRC.unpack(header[-_CRC.size :])[0]
        magic, version, code, length, number, monotonic_ns, wall_ns, payload_crc, link = _FIELDS.unpack_from(head)
        if magic != MAGIC or crc32c.crc32c(head) != crc:
            return
        if version != VERSION or code not in _BY_CODE:
            raise WalError(f"{path} has records of version {version}, kind {code}: use a runtime of the newer release")
        begin = offset + HEADER_BYTES
        payload = data[begin : begin + length]
        linked = link == previous and (offset == 0 or number == sequence + 1)
        if not linked or len(payload) != length or crc32c.crc32c(payload) != payload_crc:
            return
        try:
            fields = json.loads(payload)
        except ValueError as error:
            raise WalError(f"{path}: record {number} verifies but is no JSON: {error}") from error
        offset, sequence, previous = begin + length, number, crc
        yield Record(
            kind=_BY_CODE[code],
            fields=fields,
            sequence=number,
            monotonic_ns=monotonic_ns,
            wall_ns=wall_ns,
            crc=crc,
            end=offset,
        )
