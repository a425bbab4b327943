"""One memory snapshot in a plain file of the memory volume: sealed and whole, or not there.

A slot is sealed by storing its generation in one aligned word after everything else is written, and unsealed the same
way before anything is overwritten, so a kill at any instruction leaves no half that looks whole. What is sealed is
still believed only when its digest matches, and it is sealed only when every float in it is finite.

File: 128 bytes of header words; then layout and facts as JSON and the blobs, one after the other; then tensors at
multiples of 64 bytes.
"""

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import xxhash
from torch import Tensor

from esper_runtime.tolaria.beside import WORTH_BYTES, Beside
from esper_runtime.tolaria.ring import Held
from esper_runtime.tolaria.soundness import Array, Check, finite_check

MAGIC: Final = int.from_bytes(b"ESPSNAP2", "little")
CHUNK_BYTES: Final = 512 * 1024
"""Hashed and checked piece by piece, so that what follows reads from the cache; a state too small for two threads is
copied so too. Measured from 128 KiB to 1 MiB: below this the calls cost more, above it source and target leave the
second-level cache."""
ALIGN: Final = 64
_PAGE: Final = 4096
_HEAD_BYTES: Final = 64 * 1024
"""Least room for facts and blobs."""
_HEADER_WORDS: Final = 16
_HEADER_BYTES: Final = 8 * _HEADER_WORDS
# Header words. Good holds a copy of check where the snapshot is good, so that no single flipped bit makes it so.
_W_MAGIC, _W_GENERATION, _W_GOOD, _W_STEP, _W_LAYOUT, _W_META, _W_BLOBS, _W_PAYLOAD, _W_START = range(9)
_W_HEAD, _W_DIGEST_LOW, _W_DIGEST_HIGH, _W_CHECK = range(9, 13)
_MASK: Final = 2**64 - 1
Ranges = Sequence[tuple[int, int]]
"""Elements from, to: increasing and apart."""


class SnapshotError(Exception):
    """The memory volume cannot hold the snapshots; the message says how much is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a slot holds. `tensors` are views of its memory, or live ones: copy them before the next capture."""

    step: int
    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    blobs: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One tensor of the state: where it lies now and where it goes, in bytes of the payload."""

    name: str
    start: int
    size: int
    memory: memoryview | Tensor
    """A Tensor of bytes where it is not on the CPU."""
    element_bytes: int
    check: tuple[type, Check] | None
    exempt: Ranges


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Where everything goes; the same for all slots. Made anew when the set of tensors changes."""

    layout: bytes
    sources: tuple[Source, ...]
    payload_bytes: int
    head_bytes: int
    """Room for facts and blobs."""
    start: int = field(init=False)
    """Of the payload in the file."""

    def __post_init__(self) -> None:
        head_end = _HEADER_BYTES + len(self.layout) + self.head_bytes
        object.__setattr__(self, "start", -(-head_end // _PAGE) * _PAGE)

    @property
    def slot_bytes(self) -> int:
        return -(-(self.start + self.payload_bytes) // _PAGE) * _PAGE


def plan_of(
    identity: str, tensors: Mapping[str, Tensor], *, head_bytes: int, exempt: Mapping[str, Ranges] | None = None
) -> Plan:
    """`head_bytes` is what facts and blobs take now. SnapshotError for a tensor with gaps."""
    entries: list[dict[str, Any]] = []
    sources: list[Source] = []
    end = 0
    for name, tensor in tensors.items():
        entries.append({"name": name, "offset": end, "size": tensor.nbytes, **_description(tensor)})
        if tensor.nbytes:
            sources.append(
                Source(
                    name=name,
                    start=end,
                    size=tensor.nbytes,
                    memory=_memory(tensor),
                    element_bytes=tensor.element_size(),
                    check=finite_check(tensor.dtype),
                    exempt=(exempt or {}).get(name, ()),
                )
            )
        end += -(-tensor.nbytes // ALIGN) * ALIGN
    layout = json.dumps({"identity": identity, "entries": entries}, separators=(",", ":")).encode()
    room = max(_HEAD_BYTES, 2 * head_bytes)
    return Plan(layout=layout, sources=tuple(sources), payload_bytes=end, head_bytes=room)


_DOCUMENT = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def encoded(meta: Mapping[str, Any], blobs: Mapping[str, bytes]) -> tuple[bytes, bytes]:
    """Facts and blobs as they are written."""
    index = [[name, len(blob)] for name, blob in blobs.items()]
    return _DOCUMENT.encode({"meta": meta, "blobs": index}).encode(), b"".join(blobs.values())


@dataclass(slots=True)
class _Part:
    """A source, cut for one slot."""

    name: str
    check: Check | None
    device_copy: tuple[Tensor, Tensor] | None = None
    """(target, source), for memory that is not on the CPU."""
    whole: tuple[Array, Array] | None = None
    """(target, source) in bytes, for memory that is."""
    pieces: list[tuple[memoryview, memoryview | None, memoryview, Array | None]] = field(default_factory=list)
    """(target, source, what is hashed: the target and the gap behind it, what is checked)"""
    originals: list[tuple[memoryview, memoryview, Array | None]] = field(default_factory=list)
    """The same of the source: (what is hashed, the gap behind the target, what is checked)"""


class Slot:
    """One slot's file. Grows when a state does; never shrinks."""

    def __init__(self, path: Path, number: int, beside: Beside) -> None:
        self.path = path
        self.number = number
        self._beside = beside
        self.size = 0
        self._map: mmap.mmap | None = None
        self._bytes = memoryview(b"")
        self._words = memoryview(bytes(_HEADER_BYTES)).cast("Q")
        self._plan: Plan | None = None
        self._parts: list[_Part] = []
        if path.exists() and path.stat().st_size >= _HEADER_BYTES:
            self._open(path.stat().st_size)

    # Header

    @property
    def generation(self) -> int:
        return self._words[_W_GENERATION]

    def held(self) -> Held | None:
        """None when it is not sealed. Nothing is verified here."""
        words = self._words
        if words[_W_MAGIC] != MAGIC or not words[_W_GENERATION]:
            return None
        good = words[_W_GOOD] == words[_W_CHECK]
        return Held(slot=self.number, generation=words[_W_GENERATION], step=words[_W_STEP], good=good)

    def promote(self, before_step: int) -> None:
        words = self._words
        if words[_W_GENERATION] and words[_W_STEP] < before_step:
            words[_W_GOOD] = words[_W_CHECK]

    def unseal(self) -> None:
        if self._map is not None:
            self._words[_W_GENERATION] = 0

    def _header_check(self, generation: int) -> int:
        """Over everything in the header that does not change after sealing. Never 0."""
        words = self._bytes[8 * _W_STEP : 8 * _W_CHECK]
        return xxhash.xxh3_64_intdigest(words, seed=generation) or 1

    # Writing

    def write(self, plan: Plan, head: tuple[bytes, bytes], *, generation: int, step: int, good: bool) -> list[str]:
        """Copies the state in. Names of tensors that are not finite: then the slot stays unsealed."""
        self.unseal()
        if self._plan is not plan:
            self._parts = [self._cut(source, plan.start + source.start) for source in plan.sources]
            self._plan = plan
        words = self._words
        words[_W_MAGIC], words[_W_PAYLOAD], words[_W_START] = MAGIC, plan.payload_bytes, plan.start
        words[_W_STEP], words[_W_HEAD] = step, self._write_head(plan.layout, *head)
        digest = xxhash.xxh3_128()
        apart = plan.payload_bytes >= WORTH_BYTES and all(part.whole is not None for part in self._parts)
        bad = self._copy_apart(digest) if apart else self._copy_in(digest)
        if bad:
            return bad
        whole = digest.intdigest()
        words[_W_DIGEST_LOW], words[_W_DIGEST_HIGH] = whole & _MASK, whole >> 64
        check = words[_W_CHECK] = self._header_check(generation)
        words[_W_GOOD] = check if good else 0
        words[_W_GENERATION] = generation
        return []

    def _write_head(self, layout: bytes, meta: bytes, blobs: bytes) -> int:
        """All of it each time, so that no rot outlives the snapshot that it hit. Digest of what it ought to be."""
        words = self._words
        words[_W_LAYOUT], words[_W_META], words[_W_BLOBS] = len(layout), len(meta), len(blobs)
        head = b"".join((layout, meta, blobs))
        self._bytes[_HEADER_BYTES : _HEADER_BYTES + len(head)] = head
        return xxhash.xxh3_64_intdigest(head)

    def _copy_in(self, digest: "xxhash.xxh3_128") -> list[str]:
        """Copies, hashes and checks on the way; names of what is not finite."""
        bad: list[str] = []
        update = digest.update
        with np.errstate(all="ignore"):
            for part in self._parts:
                if part.device_copy is not None:
                    target, source = part.device_copy
                    target.copy_(source)
                check, sound = part.check, True
                for place, memory, hashed, checked in part.pieces:
                    if memory is not None:
                        place[:] = memory
                    update(hashed)
                    if checked is not None and check is not None and not check(checked):
                        sound = False
                if not sound:
                    bad.append(part.name)
        return bad

    def _copy_apart(self, digest: "xxhash.xxh3_128") -> list[str]:
        """As _copy_in, with hash and check of the sources in another thread."""
        audit = self._beside.start(lambda: self._audit(digest))
        try:
            for part in self._parts:
                assert part.whole is not None
                np.copyto(*part.whole)
        finally:
            wait((audit,))  # it reads what the caller may change afterwards
        return audit.result()

    def _audit(self, digest: "xxhash.xxh3_128") -> list[str]:
        bad: list[str] = []
        with np.errstate(all="ignore"):
            for part in self._parts:
                sound = True
                for hashed, gap, checked in part.originals:
                    digest.update(hashed)
                    if gap:
                        digest.update(gap)
                    if checked is not None and part.check is not None and not part.check(checked):
                        sound = False
                if not sound:
                    bad.append(part.name)
        return bad

    def _cut(self, source: Source, start: int) -> _Part:
        part = _Part(source.name, None if source.check is None else source.check[1])
        memory = source.memory
        if isinstance(memory, Tensor):
            target = torch.frombuffer(self._bytes, dtype=torch.uint8, count=source.size, offset=start)
            part.device_copy = (target, memory)
        else:
            part.whole = _flat(self._bytes[start : start + source.size]), _flat(memory)
        padded = -(-source.size // ALIGN) * ALIGN
        for begin, end, exempt in _intervals(source):
            whole = self._bytes[start + begin : start + (padded if end == source.size else end)]
            place = whole[: end - begin]
            kind = None if source.check is None or exempt else source.check[0]
            original = memory[begin:end] if isinstance(memory, memoryview) else None
            part.pieces.append((place, original, whole, _as_array(place, kind)))
            if original is not None:
                part.originals.append((original, whole[end - begin :], _as_array(original, kind)))
        return part

    def reserve(self, size: int) -> None:
        """Makes the file at least so large, and its pages present. What it holds stays. OSError when it cannot."""
        if size <= self.size:
            return
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
        self._open(size)

    def _open(self, size: int) -> None:
        self.close()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            # Populated now: the first touch of shared memory costs 20 times a copy.
            self._map = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(descriptor)
        self._bytes = memoryview(self._map)
        self._words = self._bytes[:_HEADER_BYTES].cast("Q")
        self.size = size

    def close(self) -> None:
        self._plan = None
        self._parts = []
        self._words = memoryview(bytes(_HEADER_BYTES)).cast("Q")
        self._bytes = memoryview(b"")
        self._map = None  # unmapped when the last view of it is gone
        self.size = 0

    def remove(self) -> None:
        """Gives its memory back."""
        self.unseal()
        self.close()
        self.path.unlink(missing_ok=True)

    # Reading

    def read(self, identity: str, into: Mapping[str, Tensor], *, verify_first: bool) -> Content | None:
        """See Snapshots.restore."""
        words = self._words
        meta_end = _HEADER_BYTES + words[_W_LAYOUT] + words[_W_META]
        head_end = meta_end + words[_W_BLOBS]
        fits = head_end <= words[_W_START] and words[_W_START] + words[_W_PAYLOAD] <= self.size
        if words[_W_CHECK] != self._header_check(self.generation) or not fits:
            return None
        head = self._bytes[_HEADER_BYTES:head_end]
        if words[_W_HEAD] != xxhash.xxh3_64_intdigest(head):
            return None
        layout = json.loads(bytes(head[: words[_W_LAYOUT]]))
        facts = json.loads(bytes(head[words[_W_LAYOUT] : meta_end - _HEADER_BYTES]))
        if layout["identity"] != identity:
            return None
        payload = self._bytes[words[_W_START] : words[_W_START] + words[_W_PAYLOAD]]
        if verify_first and not self._verifies(xxhash.xxh3_128(payload)):
            return None
        if verify_first:
            tensors = self._copy_out(layout["entries"], into, None)
        elif len(payload) >= WORTH_BYTES:
            hashed = self._beside.start(lambda: xxhash.xxh3_128(payload))
            tensors = self._copy_out(layout["entries"], into, None)
            if not self._verifies(hashed.result()):
                return None
        else:
            digest = xxhash.xxh3_128()
            tensors = self._copy_out(layout["entries"], into, digest)
            if not self._verifies(digest):
                return None
        blobs = _blobs(self._bytes[meta_end:head_end], facts["blobs"])
        return Content(step=words[_W_STEP], meta=facts["meta"], tensors=tensors, blobs=blobs)

    def _verifies(self, digest: "xxhash.xxh3_128") -> bool:
        return bool(digest.intdigest() == self._words[_W_DIGEST_LOW] | (self._words[_W_DIGEST_HIGH] << 64))

    def _copy_out(
        self, entries: Sequence[Mapping[str, Any]], into: Mapping[str, Tensor], digest: "xxhash.xxh3_128 | None"
    ) -> dict[str, Tensor]:
        """Tensors by name: live ones, filled, or views. Hashes on the way where a digest is given."""
        tensors: dict[str, Tensor] = {}
        base = self._words[_W_START]
        for entry in entries:
            name, start, size = entry["name"], base + entry["offset"], entry["size"]
            stored = self._bytes[start : start + -(-size // ALIGN) * ALIGN]
            live = into.get(name)
            if live is not None and size and _description(live).items() <= entry.items():
                _copy_hashed(stored, live, digest)
                tensors[name] = live
                continue
            if digest is not None:
                digest.update(stored)
            tensors[name] = _as_tensor(self._bytes, start, entry)
        return tensors


def _flat(memory: memoryview) -> Array:
    return np.frombuffer(memory, dtype=np.uint8)


def _as_array(memory: memoryview, kind: type | None) -> Array | None:
    return None if kind is None else np.frombuffer(memory, dtype=kind)


def _intervals(source: Source) -> Iterator[tuple[int, int, bool]]:
    """(from, to, exempt) in bytes: cut at the ends of exempt ranges and after CHUNK_BYTES."""
    width = source.element_bytes
    edges = {0, source.size, *(edge * width for span in source.exempt for edge in span)}
    exempt = {begin * width for begin, end in source.exempt if begin < end}
    ordered = sorted(edges)
    for low, high in pairwise(ordered):
        for begin in range(low, high, CHUNK_BYTES):
            yield begin, min(begin + CHUNK_BYTES, high), low in exempt


def _description(tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "stride": list(tensor.stride())}


def flat_bytes(tensor: Tensor) -> Tensor | None:
    """The tensor's memory as bytes in memory order; None when it has gaps."""
    flat = tensor.detach()
    if flat.is_contiguous():
        return flat.reshape(-1).view(torch.uint8)
    dense = flat.untyped_storage().nbytes() >= flat.nbytes and _is_dense(flat)
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8) if dense else None


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _memory(tensor: Tensor) -> memoryview | Tensor:
    flat = flat_bytes(tensor)
    if flat is None:
        raise SnapshotError(f"a state tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()} has gaps")
    array: Any = flat.numpy() if flat.device.type == "cpu" else None
    return flat if array is None else memoryview(array)


def _copy_hashed(stored: memoryview, live: Tensor, digest: "xxhash.xxh3_128 | None") -> None:
    """`stored` may end in a gap, which is hashed only."""
    target, size = _memory(live), live.nbytes
    if isinstance(target, Tensor):
        if digest is not None:
            digest.update(stored)
        target.copy_(torch.frombuffer(stored, dtype=torch.uint8, count=size))
    elif digest is None:
        np.copyto(_flat(target), _flat(stored[:size]))
    else:
        for begin in range(0, len(stored), CHUNK_BYTES):
            piece = stored[begin : begin + CHUNK_BYTES]
            digest.update(piece)
            end = min(begin + len(piece), size)
            target[begin:end] = piece[: end - begin]


def _as_tensor(raw: memoryview, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, entry["dtype"])
    if not entry["size"]:
        return torch.empty(entry["shape"], dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8, count=entry["size"], offset=start).view(dtype)
    return flat.as_strided(entry["shape"], entry["stride"], flat.storage_offset())


def _blobs(raw: memoryview, index: Sequence[tuple[str, int]]) -> dict[str, bytes]:
    blobs: dict[str, bytes] = {}
    end = 0
    for name, size in index:
        blobs[name] = bytes(raw[end : end + size])
        end += size
    return blobs
