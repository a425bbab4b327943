"""manifest.json: what a generation consists of. Written last, so a directory without it is no generation.

The text is canonical: a reader renders what it parsed and compares bytes, so that any change of any byte is
noticed, the digest of the manifest itself included.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from esper_leyline.phases import Durability

from esper_runtime.checkpoint import shards
from esper_runtime.checkpoint.errors import CorruptFileError

NAME = "manifest.json"
VERSION = 2
SPLIT_VERSION = 3
"""Of a generation with a group in several files: a runtime that knows only whole groups must not take it for its own.

Nothing else differs from version 2, which all other generations have.
"""
READS = (1, 2, 3)
MAX_BYTES = 4 * 1024 * 1024
_DIRECTORY = re.compile(r"gen-(\d{10,})")
_DIGEST_KEY = "manifest_xxh3_128"
_SINCE_2 = frozenset({"aged_at", "suspect", "durability", "txn", "context"})


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """Size in bytes and two independent checksums of one file, as hex."""

    size: int
    crc32c: str
    xxh3_128: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One generation. `number` rises over the whole run; `parent` is the generation before it, None for the first."""

    run_uid: str
    attempt: int
    number: int
    parent: int | None
    step: int
    epoch: int
    created: float
    """Unix seconds; for people, never for order."""
    torch: str
    direct_io: bool
    verification: str
    metrics: Mapping[str, float]
    files: Mapping[str, FileDigest]
    # Since version 2
    aged_at: float | None = None
    """Seconds on a clock that goes on while the run's processes do and never jumps; for ages."""
    suspect: bool = False
    """Saved while the loss was under suspicion: never a target of its own accord."""
    durability: str = Durability.UNKNOWN
    """esper_leyline.phases.Durability"""
    txn: int | None = None
    """Of the save in the run's log."""
    context: Mapping[str, str] = field(default_factory=dict)
    """What made it: code, model, device, filesystem."""
    version: int = VERSION

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def render(self) -> bytes:
        body = {name: value for name, value in asdict(self).items() if self.version > 1 or name not in _SINCE_2}
        return _text({**body, _DIGEST_KEY: xxhash.xxh3_128_hexdigest(_text(body))})


def version_of(files: Mapping[str, FileDigest]) -> int:
    """The version that a manifest of these files has."""
    return SPLIT_VERSION if shards.is_split(files) else VERSION


def directory_name(number: int) -> str:
    return f"gen-{number:010d}"


def number_of(directory: str) -> int | None:
    """Generation number in a directory's name; None when it is none of ours."""
    match = _DIRECTORY.fullmatch(directory)
    return int(match[1]) if match else None


def read(directory: Path, *, run_uid: str, attempt: int, where: str) -> Manifest:
    """The manifest in `directory`. CorruptFileError (naming `where`/manifest.json) when it is anything but whole."""
    name = f"{where}/{NAME}"
    try:
        with (directory / NAME).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise CorruptFileError(name, "missing") from error
    except OSError as error:
        raise CorruptFileError(name, f"cannot be read: {error}") from error
    manifest = _parse(raw, name)
    expected = (run_uid, attempt, number_of(directory.name))
    if (manifest.run_uid, manifest.attempt, manifest.number) != expected:
        raise CorruptFileError(
            name,
            f"belongs to run {manifest.run_uid}, attempt {manifest.attempt}, generation {manifest.number}: "
            "moved or copied here",
        )
    return manifest


def _parse(raw: bytes, name: str) -> Manifest:
    try:
        document = json.loads(raw)
        document.pop(_DIGEST_KEY)
        if (version := document["version"]) not in READS:
            raise CorruptFileError(name, f"has version {version!r}; this runtime reads {READS}")
        files = {key: FileDigest(**value) for key, value in document.pop("files").items()}
        manifest = Manifest(**document, files=files)
        whole = manifest.render() == raw
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptFileError(name, f"unreadable ({type(error).__name__}: {error})") from error
    if not whole:
        raise CorruptFileError(name, "digest mismatch")
    return manifest


def _text(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
