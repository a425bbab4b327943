"""Memory snapshots: two slots in plain files of the memory volume, one of them valid at every instant.

They survive the death of the trainer, not of the pod. A slot is sealed by storing its generation in one aligned word
after everything else is written, and unsealed the same way before anything is overwritten, so a kill at any
instruction leaves the other slot whole. What is sealed is still believed only when its digest matches. A new snapshot
is a candidate; it becomes good, and so a target of rollback, when a later step has shown that its weights are sound.

File: 128 bytes of header words, then layout and meta as JSON, then tensors at multiples of 64 bytes.
"""

import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from esper_leyline import paths
from torch import Tensor

MAGIC: Final = int.from_bytes(b"ESPSNAP1", "little")
CHUNK_BYTES: Final = 256 * 1024
"""Copied and hashed piece by piece, so that the hash reads from the cache."""
_ALIGN: Final = 64
_PAGE: Final = 4096
_META_BYTES: Final = 64 * 1024
_HEADER_WORDS: Final = 16
_HEADER_BYTES: Final = 8 * _HEADER_WORDS
# Header words.
_W_MAGIC, _W_GENERATION, _W_GOOD, _W_STEP, _W_LAYOUT, _W_META, _W_PAYLOAD, _W_START = range(8)
_W_DIGEST_LOW, _W_DIGEST_HIGH, _W_CHECK = 8, 9, 10
SLOTS: Final = 2


class SnapshotError(Exception):
    """The memory volume cannot hold the snapshots; the message says how much is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A sealed slot, as its header tells."""

    slot: int
    generation: int
    step: int
    good: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a slot holds. `tensors` are views of its memory: copy them before the next capture."""

    step: int
    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    blobs: Mapping[str, bytes]


class Snapshots:
    """The two slots of one trainer process. `identity` tells whose state it is; others' slots are not seen."""

    def __init__(self, directory: Path, *, identity: str, rank: int = 0) -> None:
        self._files = [_File(directory / f"{paths.SNAPSHOT_PREFIX}.{rank}.{slot}") for slot in range(SLOTS)]
        self._identity = identity
        self._generation = max((file.generation for file in self._files), default=0)

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self._files)

    def held(self) -> list[Held]:
        """Sealed slots, newest first. Nothing is verified here."""
        found = [held for slot, file in enumerate(self._files) if (held := file.held(slot)) is not None]
        return sorted(found, key=lambda held: -held.generation)

    def capture(
        self,
        *,
        step: int,
        tensors: Mapping[str, Tensor],
        blobs: Mapping[str, bytes],
        meta: Mapping[str, Any],
        good: bool,
    ) -> None:
        """Copies a state into the slot that matters less: an unsealed one, a candidate, or the older good one.

        SnapshotError when the volume cannot hold it; the other slot is intact then.
        """
        file = self._files[self._victim()]
        self._generation += 1
        file.write(self._identity, self._generation, step, tensors, blobs, meta, good=good)

    def _victim(self) -> int:
        def worth(slot: int) -> tuple[bool, bool, int]:
            held = self._files[slot].held(slot)
            return (held is not None, held is not None and held.good, held.generation if held else 0)

        return min(range(SLOTS), key=worth)

    def promote(self, *, before_step: int) -> None:
        """Candidates taken at a step below `before_step` are good from now on."""
        for file in self._files:
            file.promote(before_step)

    def discard(self, held: Held) -> None:
        """Forgets one slot."""
        self._files[held.slot].unseal()

    def discard_after(self, step: int) -> None:
        """Forgets all slots with a step above `step`."""
        for held in self.held():
            if held.step > step:
                self.discard(held)

    def restore(self, held: Held, into: Mapping[str, Tensor]) -> Content | None:
        """Copies the slot's tensors into live ones of the same name and size while verifying; None if it is no good.

        When None comes back, live tensors may be half overwritten: use another source. Tensors without a live
        counterpart are given out as views.
        """
        return self._files[held.slot].read(self._identity, into)

    def close(self) -> None:
        for file in self._files:
            file.close()


class _File:
    """One slot's file. Grows when a state does; never shrinks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._map: mmap.mmap | None = None
        self._bytes = memoryview(b"")
        self._words = memoryview(bytes(_HEADER_BYTES)).cast("Q")
        self._layout_key: tuple[Any, ...] = ()
        self._sources: list[tuple[int, int, memoryview | Tensor]] = []
        self._blob_places: dict[str, tuple[int, int]] = {}
        if path.exists() and path.stat().st_size >= _HEADER_BYTES:
            self._open(path.stat().st_size)

    # Header

    @property
    def generation(self) -> int:
        return self._words[_W_GENERATION]

    def held(self, slot: int) -> Held | None:
        words = self._words
        if words[_W_MAGIC] != MAGIC or not words[_W_GENERATION]:
            return None
        return Held(slot=slot, generation=words[_W_GENERATION], step=words[_W_STEP], good=bool(words[_W_GOOD]))

    def promote(self, before_step: int) -> None:
        words = self._words
        if words[_W_GENERATION] and not words[_W_GOOD] and words[_W_STEP] < before_step:
            words[_W_GOOD] = 1

    def unseal(self) -> None:
        if self._map is not None:
            self._words[_W_GENERATION] = 0

    # Writing

    def write(
        self,
        identity: str,
        generation: int,
        step: int,
        tensors: Mapping[str, Tensor],
        blobs: Mapping[str, bytes],
        meta: Mapping[str, Any],
        *,
        good: bool,
    ) -> None:
        self.unseal()
        self._arrange(identity, tensors, blobs)
        words = self._words
        encoded = json.dumps(meta, separators=(",", ":"), allow_nan=False).encode()
        if len(encoded) > _META_BYTES:
            raise SnapshotError(f"the state's description has {len(encoded)} bytes; at most {_META_BYTES}")
        layout_end = _HEADER_BYTES + words[_W_LAYOUT]
        self._bytes[layout_end : layout_end + len(encoded)] = encoded
        words[_W_META] = len(encoded)
        words[_W_STEP] = step
        words[_W_GOOD] = int(good)
        for name, blob in blobs.items():
            start, size = self._blob_places[name]
            self._bytes[start : start + size] = blob
        digest = self._copy_in(layout_end + len(encoded)).intdigest()
        words[_W_DIGEST_LOW], words[_W_DIGEST_HIGH] = digest & (2**64 - 1), digest >> 64
        words[_W_CHECK] = self._header_check()
        words[_W_GENERATION] = generation

    def _copy_in(self, head_end: int) -> "xxhash.xxh3_128":
        """Copies all tensors, hashing on the way: layout and meta, then tensors and blobs in order of place."""
        digest = xxhash.xxh3_128(self._bytes[_HEADER_BYTES:head_end])
        target = self._bytes
        for start, size, source in self._sources:
            if isinstance(source, memoryview):
                for begin in range(0, size, CHUNK_BYTES):
                    end = min(begin + CHUNK_BYTES, size)
                    piece = target[start + begin : start + end]
                    piece[:] = source[begin:end]
                    digest.update(piece)
            else:
                torch.frombuffer(target, dtype=torch.uint8, count=size, offset=start).copy_(source)
                digest.update(target[start : start + size])
        for start, size in self._blob_places.values():
            digest.update(target[start : start + size])
        return digest

    def _arrange(self, identity: str, tensors: Mapping[str, Tensor], blobs: Mapping[str, bytes]) -> None:
        """Decides where everything lies. Costs something only when the set of tensors has changed."""
        key = (
            identity,
            *((name, tensor.data_ptr(), tensor.nbytes) for name, tensor in tensors.items()),
            *((name, len(blob)) for name, blob in blobs.items()),
        )
        if key == self._layout_key and self._map is not None:
            return
        entries, places, end = _layout(tensors, blobs)
        layout = json.dumps({"identity": identity, "entries": entries}, separators=(",", ":")).encode()
        shift = -(-(_HEADER_BYTES + len(layout) + _META_BYTES) // _PAGE) * _PAGE
        self._reserve(shift + end)
        self._bytes[_HEADER_BYTES : _HEADER_BYTES + len(layout)] = layout
        words = self._words
        words[_W_MAGIC], words[_W_LAYOUT], words[_W_PAYLOAD], words[_W_START] = MAGIC, len(layout), end, shift
        self._sources = [
            (shift + places[name][0], tensor.nbytes, _source(tensor))
            for name, tensor in tensors.items()
            if tensor.nbytes
        ]
        self._blob_places = {name: (shift + places[name][0], places[name][1]) for name in blobs}
        self._layout_key = key

    def _reserve(self, size: int) -> None:
        if size <= self.size:
            return
        self._layout_key = ()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            raise SnapshotError(
                f"a snapshot needs {SLOTS} x {size >> 20} MiB in {self.path.parent}: {error.strerror}; "
                "raise spec.runtime.sharedMemorySize"
            ) from error
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
        self._sources = []
        self._layout_key = ()
        self._words = memoryview(bytes(_HEADER_BYTES)).cast("Q")
        self._bytes = memoryview(b"")
        self._map = None  # unmapped when the last view of it is gone

    # Reading

    def read(self, identity: str, into: Mapping[str, Tensor]) -> Content | None:
        words = self._words
        head_end = _HEADER_BYTES + words[_W_LAYOUT] + words[_W_META]
        fits = head_end <= words[_W_START] and words[_W_START] + words[_W_PAYLOAD] <= self.size
        if words[_W_CHECK] != self._header_check() or not fits:
            return None
        head = self._bytes[_HEADER_BYTES:head_end]
        try:
            layout = json.loads(bytes(head[: words[_W_LAYOUT]]))
            meta = json.loads(bytes(head[words[_W_LAYOUT] :]))
        except ValueError:
            return None
        if layout["identity"] != identity:
            return None
        digest = xxhash.xxh3_128(head)
        tensors, blobs = self._copy_out(layout["entries"], into, digest)
        want = words[_W_DIGEST_LOW] | (words[_W_DIGEST_HIGH] << 64)
        if digest.intdigest() != want:
            return None
        return Content(step=words[_W_STEP], meta=meta, tensors=tensors, blobs=blobs)

    def _copy_out(
        self, entries: Sequence[Mapping[str, Any]], into: Mapping[str, Tensor], digest: "xxhash.xxh3_128"
    ) -> tuple[dict[str, Tensor], dict[str, bytes]]:
        tensors: dict[str, Tensor] = {}
        blobs: dict[str, bytes] = {}
        base = self._words[_W_START]
        for entry in entries:
            name, start, size = entry["name"], base + entry["offset"], entry["size"]
            stored = self._bytes[start : start + size]
            if entry.get("dtype") is None:
                digest.update(stored)
                blobs[name] = bytes(stored)
                continue
            live = into.get(name)
            if live is not None and size and _description(live).items() <= entry.items():
                _copy_hashed(stored, live, digest)
                tensors[name] = live
            else:
                digest.update(stored)
                tensors[name] = _as_tensor(self._bytes, start, entry)
        return tensors, blobs

    def _header_check(self) -> int:
        """Over everything in the header that does not change after sealing."""
        return xxhash.xxh3_64_intdigest(self._bytes[8 * _W_STEP : 8 * _W_CHECK])


def _layout(
    tensors: Mapping[str, Tensor], blobs: Mapping[str, bytes]
) -> tuple[list[dict[str, Any]], dict[str, tuple[int, int]], int]:
    """(entries, name -> (offset, size), end of the payload)."""
    entries: list[dict[str, Any]] = []
    places: dict[str, tuple[int, int]] = {}
    end = 0
    sized: Iterable[tuple[str, int, dict[str, Any]]] = (
        *((n, t.nbytes, _description(t)) for n, t in tensors.items()),
        *((n, len(b), {}) for n, b in blobs.items()),
    )
    for name, size, more in sized:
        entries.append({"name": name, "offset": end, "size": size, **more})
        places[name] = (end, size)
        end += -(-size // _ALIGN) * _ALIGN
    return entries, places, end


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


def _source(tensor: Tensor) -> memoryview | Tensor:
    flat = flat_bytes(tensor)
    if flat is None:
        raise SnapshotError(f"a state tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()} has gaps")
    array: Any = flat.numpy() if flat.device.type == "cpu" else None
    return flat if array is None else memoryview(array)


def _copy_hashed(stored: memoryview, live: Tensor, digest: "xxhash.xxh3_128") -> None:
    target = _source(live)
    if isinstance(target, memoryview):
        for begin in range(0, len(stored), CHUNK_BYTES):
            piece = stored[begin : begin + CHUNK_BYTES]
            digest.update(piece)
            target[begin : begin + len(piece)] = piece
    else:
        digest.update(stored)
        target.copy_(torch.frombuffer(stored, dtype=torch.uint8))


def _as_tensor(raw: memoryview, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, entry["dtype"])
    if not entry["size"]:
        return torch.empty(entry["shape"], dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8, count=entry["size"], offset=start).view(dtype)
    return flat.as_strided(entry["shape"], entry["stride"], flat.storage_offset())
