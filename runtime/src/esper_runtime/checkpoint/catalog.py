"""What lies below a run's directory: generations by name, and what their manifests say. Needs no torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from esper_runtime.checkpoint import manifest as manifests
from esper_runtime.checkpoint import shards
from esper_runtime.checkpoint.errors import CorruptFileError
from esper_runtime.checkpoint.files import Disk, digest_file
from esper_runtime.checkpoint.manifest import FileDigest, Manifest
from esper_runtime.checkpoint.retention import Generation
from esper_runtime.checkpoint.volume import attempts_below


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One directory with a generation's name; either its manifest or what is wrong with that."""

    attempt: int
    path: Path
    manifest: Manifest | None = None
    problem: str = ""

    @property
    def where(self) -> str:
        return place_of(self.path)


def place_of(directory: Path) -> str:
    """A generation's path relative to its run's directory."""
    return f"{directory.parent.name}/{directory.name}"


def directories(run_dir: Path) -> list[tuple[int, Path]]:
    """(attempt, generation directory) of everything that carries a generation's name, oldest first."""
    found: list[tuple[int, int, Path]] = []
    for attempt in attempts_below(run_dir):
        for entry in (run_dir / f"a{attempt:05d}").iterdir():
            number = manifests.number_of(entry.name)
            if number is not None:
                found.append((attempt, number, entry))
    return [(attempt, entry) for attempt, _, entry in sorted(found)]


def numbers(run_dir: Path) -> list[int]:
    """Every generation number in use, readable or not."""
    return [manifests.number_of(directory.name) or 0 for _, directory in directories(run_dir)]


def newest_first(run_dir: Path, run_uid: str) -> Iterator[Entry]:
    """Each generation with its manifest, read when it is asked for."""
    for attempt, directory in reversed(directories(run_dir)):
        try:
            found = manifests.read(directory, run_uid=run_uid, attempt=attempt, where=place_of(directory))
        except CorruptFileError as error:
            yield Entry(attempt=attempt, path=directory, problem=str(error))
        else:
            yield Entry(attempt=attempt, path=directory, manifest=found)


def generation_of(manifest: Manifest, path: Path) -> Generation:
    return Generation(
        attempt=manifest.attempt,
        number=manifest.number,
        step=manifest.step,
        epoch=manifest.epoch,
        path=path,
        size_bytes=manifest.size_bytes,
        created=manifest.created,
        aged_at=manifest.created if manifest.aged_at is None else manifest.aged_at,
        suspect=manifest.suspect,
        files=len(manifest.files),
        metrics=dict(manifest.metrics),
    )


def damages(entry: Entry, disk: Disk) -> Iterator[str]:
    """What is wrong with a generation, every byte of every file read. Nothing: it is whole."""
    if entry.manifest is None:
        yield entry.problem
        return
    for name, why in misfits(entry):
        yield f"{entry.where}/{name}: {why}"
    for name, want in entry.manifest.files.items():
        why = _damage(entry.path / name, want, disk)
        if why:
            yield f"{entry.where}/{name}: {why}"


def misfits(entry: Entry) -> list[tuple[str, str]]:
    """(file, why) of what the names of a generation's files alone give away; see shards.misfits."""
    assert entry.manifest is not None
    try:
        present = os.listdir(entry.path)
    except OSError as error:
        return [(".", f"cannot be read: {error}")]
    return list(shards.misfits(entry.manifest.files, present))


def _damage(path: Path, want: FileDigest, disk: Disk) -> str:
    try:
        size = path.stat().st_size
        if size != want.size:
            return f"has {size} bytes instead of {want.size}"
        found = digest_file(path, size=want.size, disk=disk)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error}"
    return "" if found == want else f"digest mismatch: {found.xxh3_128} instead of {want.xxh3_128}"
