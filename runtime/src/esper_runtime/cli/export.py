"""An exported model: model.safetensors with model.json, which holds its size and digest.

A large model is several files, model-00001-of-00003.safetensors and so on, with an index of their tensors beside them.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esper_runtime.cli.backend import BackendError

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
DESCRIPTION = "model.json"
MAX_DESCRIPTION = 1 << 20
_CHUNK = 1 << 20
_PARTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?")
"""Files of a model by name, whatever their number."""


def opened_first(directory: Path) -> Path:
    """The file of an export that a reader is to be given: the index where there are several files."""
    index = directory / INDEX
    return index if index.exists() else directory / MODEL


def copy_verified(source: Path, destination: Path) -> list[Path]:
    """Copies an export to `destination`; the files there are replaced only once the digest was found right."""
    if not (source / DESCRIPTION).is_file():
        raise BackendError(f"no exported model yet ({source} has no {DESCRIPTION}): wait until the run has Succeeded")
    with staged(destination) as draft:
        for entry in sorted(source.iterdir()):
            if entry.is_file():
                shutil.copyfile(entry, draft / entry.name)
        return install(draft, destination)


class staged:
    """A directory beside `destination` for files that are not verified yet; removed at the end."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self._draft: Path | None = None

    def __enter__(self) -> Path:
        try:
            self._destination.mkdir(parents=True, exist_ok=True)
            self._draft = Path(tempfile.mkdtemp(prefix=".esper-fetch-", dir=self._destination))
        except OSError as error:
            raise BackendError(f"{self._destination}: {error.strerror}: choose another destination") from error
        return self._draft

    def __exit__(self, *_: object) -> None:
        if self._draft is not None:
            shutil.rmtree(self._draft, ignore_errors=True)


def install(draft: Path, destination: Path) -> list[Path]:
    """Verifies the export in `draft` and moves its files to `destination`. BackendError names what does not fit."""
    verify(draft)
    return move(draft, destination)


def move(draft: Path, destination: Path) -> list[Path]:
    """The files of `draft` replace those of an export that was at `destination` before."""
    moved: list[Path] = []
    for entry in sorted(draft.iterdir()):
        target = destination / entry.name
        entry.replace(target)
        moved.append(target)
    for entry in destination.iterdir():
        if _PARTS.fullmatch(entry.name) and entry not in moved:
            entry.unlink()  # of a model in another number of files, which readers might take for this one
    return moved


def verify(directory: Path) -> None:
    """BackendError unless the files that model.json describes, and no others, have their sizes and digests."""
    described = _described(_description(directory / DESCRIPTION))
    for name, (size, digest) in described.items():
        _verify(directory / name, size, digest)
    strange = sorted(e.name for e in directory.iterdir() if _PARTS.fullmatch(e.name) and e.name not in described)
    if strange:
        raise BackendError(f"{strange[0]} is no part of the export that {DESCRIPTION} describes: fetch again")


def _described(description: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """(size, digest) by file name."""
    parts = description.get("files", {})
    entries = [(description.get("file"), description), *(parts.items() if isinstance(parts, dict) else ())]
    found: dict[str, tuple[int, str]] = {}
    for name, entry in entries:
        size, digest = (entry.get("size"), entry.get("xxh3_128")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or "/" in name or not isinstance(size, int) or not isinstance(digest, str):
            raise BackendError(f"{DESCRIPTION} does not say which file it describes: the export is damaged")
        found[name] = (size, digest)
    return found


def _verify(path: Path, size: int, digest: str) -> None:
    import xxhash

    name = path.name
    if not path.is_file():
        raise BackendError(f"the export lacks {name}: it is damaged; run the last epoch again or fetch a checkpoint")
    found = path.stat().st_size
    if found != size:
        raise BackendError(f"{name} has {found} bytes, {DESCRIPTION} says {size}: the copy is incomplete; fetch again")
    state = xxhash.xxh3_128()
    for chunk in _chunks(path):
        state.update(chunk)
    if state.hexdigest() != digest:
        raise BackendError(f"{name}: digest {state.hexdigest()} is not {digest}: the file is damaged; fetch again")


def _description(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_DESCRIPTION:
            raise BackendError(f"{DESCRIPTION} is longer than {MAX_DESCRIPTION} bytes: the export is damaged")
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise BackendError(f"the export lacks {DESCRIPTION}: wait until the run has Succeeded") from None
    except ValueError as error:
        raise BackendError(f"{DESCRIPTION} is no JSON: the export is damaged ({error})") from error
    return found if isinstance(found, dict) else {}


def _chunks(path: Path) -> Iterator[bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while chunk := os.read(descriptor, _CHUNK):
            yield chunk
    finally:
        os.close(descriptor)
