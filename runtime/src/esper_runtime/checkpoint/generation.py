"""One generation on the disk: files of tensors and state below a directory, described by a manifest.

No policy here: the store decides where and when, this module how.
"""

import json
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper_runtime.checkpoint import manifest as manifests
from esper_runtime.checkpoint import shards
from esper_runtime.checkpoint import tensors as safetensors
from esper_runtime.checkpoint.errors import CheckpointError, CorruptFileError, SaveError
from esper_runtime.checkpoint.files import (
    Bytes,
    Disk,
    Source,
    Stop,
    aligned_buffer,
    digest_files,
    go_on,
    write_file,
    write_memory,
)
from esper_runtime.checkpoint.host import Copy, Image
from esper_runtime.checkpoint.manifest import FileDigest, Manifest
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES
from esper_runtime.checkpoint.volume import sync_directory

STATE_FILE = "state.json"
EXPORTED_META = "model.json"
_GROUP = re.compile(r"[a-z][a-z0-9_]{0,31}")

Tensors = Mapping[str, torch.Tensor]
Room = Callable[[str, int], Bytes]
"""Gives page-aligned memory for a file, by its name without suffix, of so many bytes. OSError when there is none."""


def fresh(_: str, size: int) -> Bytes:
    """Room for everything, new each time."""
    return aligned_buffer(size)


@dataclass(frozen=True, kw_only=True)
class GenerationData:
    """One training state to save. The tensors must not change until the save is over."""

    epoch: int
    step: int
    tensors: Mapping[str, Tensors]
    """By group (model, optimizer, aux), then by name; all on the CPU. Copies say themselves how they are split."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """Whatever JSON can carry; no NaN, no infinity."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What keepBest compares. Values that are not finite are left out."""
    suspect: bool = False
    """Saved while the loss was under suspicion: never a target of its own accord."""
    sound: Callable[[], bool] = lambda: True
    """Whether all of it that should be finite is; asked by the thread that writes. If not, it is suspect too."""
    release: Callable[[], None] = lambda: None
    """Called once the tensors may change again."""


@dataclass(frozen=True, kw_only=True)
class LoadedGeneration:
    """A verified training state, in memory that is nobody else's."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    state: Mapping[str, Any]
    epoch: int
    step: int
    attempt: int
    number: int
    metrics: Mapping[str, float]
    corrupt: tuple[str, ...]
    """Newer files that did not verify, newest first: "a00001/gen-0000000007/model.safetensors: digest mismatch"."""


def write(directory: Path, data: GenerationData, header: Manifest, disk: Disk, limit: int = MAX_FILE_BYTES) -> Manifest:
    """Writes every file of a generation into an empty directory, the manifest last; all durable on return.

    Files of tensors have at most `limit` bytes, see shards. OSError or CheckpointError leave a partial directory.
    """
    files: dict[str, FileDigest] = {}
    for group, tensors in data.tensors.items():
        if not _GROUP.fullmatch(group):
            raise CheckpointError(f"{group!r} cannot be a file stem")
        files |= {name: digest for name, digest, _ in _write_group(directory, group, tensors, disk, limit)}
    files[STATE_FILE] = _write_bytes(directory / STATE_FILE, _json_bytes(data.state, "state"), disk)
    manifest = replace(header, files=files, version=manifests.version_of(files))
    _write_bytes(directory / manifests.NAME, manifest.render(), disk, commits=True)
    sync_directory(directory)
    return manifest


def verify(directory: Path, manifest: Manifest, data: GenerationData, how: str, disk: Disk) -> None:
    """Reads back what was written: nothing (None), every byte (Checksum), or as a restore would (Load).

    CorruptFileError when it is not what was meant.
    """
    where = f"{directory.parent.name}/{directory.name}"
    if how == "Checksum":
        for _ in _verified(directory, manifest, where, disk):
            pass
    elif how == "Load":
        loaded, _ = read(directory, manifest, where, disk)
        for group, tensors in data.tensors.items():
            _compare(tensors, loaded.get(group, {}), f"{where}/{shards.of_group(group, manifest.files)[0]}")


def read(
    directory: Path, manifest: Manifest, where: str, disk: Disk, stop: Stop = go_on, room: Room = fresh
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Tensors by group and name, and the state; given out only after every byte of every file has verified.

    CorruptFileError names the first file that does not; AbandonedError when `stop` said so.
    """
    if STATE_FILE not in manifest.files:
        raise CorruptFileError(f"{where}/{STATE_FILE}", "not in the manifest")
    memory = {name: _memory(name, want.size, where, room) for name, want in manifest.files.items()}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    state: dict[str, Any] = {}
    with closing(_verified(directory, manifest, where, disk, stop=stop, memory=memory)) as verified:
        for name in verified:  # decoded while the next are being read
            data = memory[name][: manifest.files[name].size]
            if name == STATE_FILE:
                state = _decode_state(data, f"{where}/{name}")
            else:
                found = _decode_tensors(data, f"{where}/{name}")
                _add(tensors.setdefault(shards.group_of(name), {}), found, f"{where}/{name}")
    return tensors, state


def write_export(
    directory: Path, tensors: Tensors, meta: Mapping[str, Any], disk: Disk, limit: int = MAX_FILE_BYTES
) -> None:
    """The finished model and a description of it, durable on return; of several files there is an index too."""
    written = _write_group(directory, shards.MODEL, tensors, disk, limit)
    index = None
    if len(written) > 1:
        index = shards.index({name: header for name, _, header in written})
        _write_bytes(directory / shards.INDEX, index, disk)
    files = shards.described({name: digest for name, digest, _ in written}, index)
    _write_bytes(directory / EXPORTED_META, _json_bytes({**meta, **files}, "meta"), disk)
    sync_directory(directory)


def _write_group(
    directory: Path, group: str, tensors: Tensors, disk: Disk, limit: int
) -> list[tuple[str, FileDigest, bytes]]:
    """(name, digest, header) of each file."""
    parts = _parts(tensors, limit)
    named = zip(shards.names(group, len(parts)), parts, strict=True)
    return [(name, _write_tensors(directory / name, part, disk), part.header) for name, part in named]


def _parts(tensors: Tensors, limit: int) -> Sequence[Image | safetensors.Layout]:
    return tensors.files if isinstance(tensors, Copy) else safetensors.split(tensors, limit, safetensors.METADATA)


def _write_tensors(path: Path, part: Image | safetensors.Layout, disk: Disk) -> FileDigest:
    if isinstance(part, Image):
        return write_memory(path, part.memory, size=part.size, disk=disk)
    return write_file(path, part.parts(), size=part.size, disk=disk)


def _write_bytes(path: Path, content: bytes, disk: Disk, *, commits: bool = False) -> FileDigest:
    parts = [np.frombuffer(content, dtype=np.uint8)]
    return write_file(path, parts, size=len(content), disk=disk, commits=commits)


def _verified(
    directory: Path,
    manifest: Manifest,
    where: str,
    disk: Disk,
    *,
    stop: Stop = go_on,
    memory: Mapping[str, Bytes] | None = None,
) -> Generator[str, None, None]:
    """Names of files, each once all its bytes are read, into `memory` where there is any, and are what they should be.

    CorruptFileError names the first that is not.
    """
    kept = memory or {}
    _check_names(directory, manifest, where)
    sources = [
        Source(path=directory / name, size=want.size, memory=kept.get(name)) for name, want in manifest.files.items()
    ]
    with closing(digest_files(sources, disk=disk, stop=stop)) as digests:
        for name, want in manifest.files.items():
            try:
                _check_size(directory / name, want, f"{where}/{name}")
                digest = next(digests)
            except FileNotFoundError as error:
                raise CorruptFileError(f"{where}/{name}", "missing") from error
            except OSError as error:
                raise CorruptFileError(f"{where}/{name}", f"cannot be read: {error}") from error
            _match(digest, want, f"{where}/{name}")
            yield name


def _memory(name: str, size: int, where: str, room: Room) -> Bytes:
    try:
        return room(name.removesuffix(shards.SUFFIX), size)
    except OSError as error:
        raise CorruptFileError(f"{where}/{name}", f"cannot be read: {error}") from error


def _check_names(directory: Path, manifest: Manifest, where: str) -> None:
    try:
        present = os.listdir(directory)
    except OSError as error:
        raise CorruptFileError(where, f"cannot be read: {error}") from error
    for name, why in shards.misfits(manifest.files, present):
        raise CorruptFileError(f"{where}/{name}", why)


def _check_size(path: Path, want: FileDigest, where: str) -> None:
    size = path.stat().st_size
    if size != want.size:
        raise CorruptFileError(where, f"has {size} bytes instead of {want.size}")


def _decode_tensors(data: Bytes, where: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.parse(data)
    except safetensors.FormatError as error:
        raise CorruptFileError(where, str(error)) from error


def _add(group: dict[str, torch.Tensor], found: Mapping[str, torch.Tensor], where: str) -> None:
    twice = min(group.keys() & found.keys(), default=None)
    if twice is not None:
        raise CorruptFileError(where, f"tensor {twice} is in another file of the group too")
    group |= found


def _decode_state(data: Bytes, where: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(data.tobytes())
    except ValueError as error:
        raise CorruptFileError(where, f"no JSON: {error}") from error
    return state


def _compare(wanted: Tensors, loaded: Tensors, where: str) -> None:
    """Bytes are known to be equal by digest; this compares what they mean."""
    if wanted.keys() != loaded.keys():
        raise CorruptFileError(where, "loads with other tensor names")
    for name, tensor in wanted.items():
        other = loaded[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            raise CorruptFileError(where, f"tensor {name} loads as {other.dtype} of {list(other.shape)}")


def _match(digest: FileDigest, want: FileDigest, where: str) -> None:
    if digest != want:
        raise CorruptFileError(where, f"digest mismatch: {digest.xxh3_128} instead of {want.xxh3_128}")


def _json_bytes(value: Mapping[str, Any], what: str) -> bytes:
    try:
        return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise SaveError(f"{what} is not JSON: {error}") from error
