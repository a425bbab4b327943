"""The safetensors format: eight bytes of header length, a JSON header, then the tensors without gaps.

Files written here open in any safetensors reader. The header is padded with spaces so that the data starts at a
4 KiB boundary, and tensors are ordered by falling item size, so that loaded tensors are plain views.
"""

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch

from esper_runtime.checkpoint.errors import CheckpointError
from esper_runtime.checkpoint.files import Bytes, align_up
from esper_runtime.checkpoint.shards import LENGTH as _LENGTH
from esper_runtime.checkpoint.shards import METADATA as _METADATA

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
METADATA: Mapping[str, str] = {"format": "pt"}
"""Of files with tensors of PyTorch."""

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


class FormatError(CheckpointError):
    """Bytes that are no safetensors file, or tensors that cannot be one."""


class Layout:
    """A file for `tensors`: total size and its bytes in order, without copying contiguous tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self._ordered = _in_order(tensors)
        self.header = _header(self._ordered, metadata or {})
        """Everything before the first tensor's bytes; says of each tensor where it lies."""
        self.size = len(self.header) + sum(tensor.nbytes for _, tensor in self._ordered)

    def parts(self) -> Iterator[Bytes]:
        """FormatError when a tensor is not on the CPU."""
        yield _array(torch.frombuffer(bytearray(self.header), dtype=torch.uint8))
        for name, tensor in self._ordered:
            if tensor.device.type != "cpu":
                raise FormatError(f"tensor {name} is on {tensor.device}; copy it to the CPU first")
            if tensor.numel():
                yield as_bytes(tensor)


def split(tensors: Mapping[str, torch.Tensor], limit: int, metadata: Mapping[str, str] | None = None) -> list[Layout]:
    """Files for `tensors`: one when it has at most `limit` bytes, else as many as it takes, at least one.

    The tensors keep the order of one file. Only a file of a single tensor may be larger than the limit.
    """
    files: list[dict[str, torch.Tensor]] = [{}]
    opening = text = _text_size([_metadata_piece(metadata)] if metadata else [])
    data = 0
    for name, tensor in _in_order(tensors):
        piece = _piece(name, tensor, data)
        if files[-1] and _header_size(text + len(piece) + 1) + data + tensor.nbytes > limit:
            files.append({})
            text, data = opening, 0
            piece = _piece(name, tensor, data)
        files[-1][name] = tensor
        text += len(piece) + 1
        data += tensor.nbytes
    return [Layout(file, metadata) for file in files]


def _in_order(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(ordered: list[tuple[str, torch.Tensor]], metadata: Mapping[str, str]) -> bytes:
    pieces = [_metadata_piece(metadata)] if metadata else []
    offset = 0
    for name, tensor in ordered:
        pieces.append(_piece(name, tensor, offset))
        offset += tensor.nbytes
    text = f"{{{','.join(pieces)}}}".encode()
    padded = _header_size(len(text)) - _LENGTH.size
    if padded > MAX_HEADER_BYTES:
        raise FormatError(f"{len(ordered)} tensors need a header of {padded} bytes; at most {MAX_HEADER_BYTES}")
    return _LENGTH.pack(padded) + text.ljust(padded)


def _header_size(text: int) -> int:
    """Of a header with its length before it and the padding behind it."""
    return align_up(_LENGTH.size + text)


def _text_size(pieces: list[str]) -> int:
    """Of a JSON object: a brace, then each piece with the comma or the brace after it. Exact unless it is empty."""
    return 1 + sum(len(piece) + 1 for piece in pieces)


def _metadata_piece(metadata: Mapping[str, str]) -> str:
    return f"{json.dumps(_METADATA)}:{json.dumps(dict(metadata), separators=(',', ':'))}"


def _piece(name: str, tensor: torch.Tensor, offset: int) -> str:
    """A tensor's entry in the header; FormatError when it can have none."""
    if name == _METADATA:
        raise FormatError(f"a tensor cannot be called {_METADATA}")
    if tensor.is_meta:
        raise FormatError(f"tensor {name} is on {tensor.device}; it has no bytes")
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise FormatError(f"tensor {name} of {tensor.dtype}, {tensor.layout} has no place in safetensors")
    entry = {
        "dtype": DTYPES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [offset, offset + tensor.nbytes],
    }
    return f"{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}"


def parse(data: Bytes) -> dict[str, torch.Tensor]:
    """Tensors as views of `data`, which must stay unchanged as long as they are used. FormatError otherwise."""
    length = _LENGTH.unpack(data[: _LENGTH.size].tobytes())[0] if len(data) >= _LENGTH.size else 0
    start = _LENGTH.size + length
    if not 2 <= length <= MAX_HEADER_BYTES or start > len(data):
        raise FormatError(f"header length {length} does not fit a file of {len(data)} bytes")
    try:
        entries = json.loads(data[_LENGTH.size : start].tobytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"header is no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise FormatError("header is no JSON object")
    entries.pop(_METADATA, None)
    body = torch.from_numpy(data[start:])
    return {name: _tensor(name, entry, body) for name, entry in entries.items()}


def _tensor(name: str, entry: Any, body: torch.Tensor) -> torch.Tensor:
    try:
        dtype = _BY_NAME[entry["dtype"]]
        shape = [int(length) for length in entry["shape"]]
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"tensor {name}: bad entry ({error!r})") from error
    if not 0 <= begin <= end <= len(body) or min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != end - begin:
        raise FormatError(f"tensor {name}: {dtype} of {shape} does not fit bytes {begin} to {end}")
    piece = body[begin:end]
    if piece.data_ptr() % dtype.itemsize:
        piece = piece.clone()  # written by somebody who does not order by item size
    return piece.view(dtype).reshape(shape)


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """A tensor's memory; that of a copy when it is not contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return _array((torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8))


def _array(tensor: torch.Tensor) -> Bytes:
    array: Bytes = tensor.numpy()
    return array
