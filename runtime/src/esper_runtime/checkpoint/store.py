"""Generations on the checkpoint volume: written whole or not at all, believed only after every byte verified.

A generation is a directory that appears by one rename after its files, its manifest and the directory itself are on
the disk. Nothing here touches a live model: loading gives CPU tensors of their own, which the caller copies.
"""

import errno
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from esper_leyline.phases import Durability
from esper_leyline.runconfig import ResumeFrom, Retention
from esper_leyline.v1.report_pb2 import CheckpointState

from esper_runtime.checkpoint import manifest as manifests
from esper_runtime.checkpoint.catalog import Entry, directories, generation_of, numbers, place_of
from esper_runtime.checkpoint.durability import Probe, probe
from esper_runtime.checkpoint.errors import (
    CheckpointError,
    CorruptFileError,
    SaveError,
    SupersededError,
)
from esper_runtime.checkpoint.feasibility import Demand, Rate, obstacles
from esper_runtime.checkpoint.files import Disk, Stop, go_on
from esper_runtime.checkpoint.generation import (
    GenerationData,
    LoadedGeneration,
    Room,
    Tensors,
    fresh,
    verify,
    write,
    write_export,
)
from esper_runtime.checkpoint.ledger import Ledger
from esper_runtime.checkpoint.loading import Search
from esper_runtime.checkpoint.manifest import Manifest
from esper_runtime.checkpoint.retention import Generation, best, superfluous
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES
from esper_runtime.checkpoint.volume import Volume, remove_tree, sync_directory
from esper_runtime.checkpoint.wal import Wal

MAX_CORRUPT_LISTED = 8
FULL_DEADLINE_S = 12.0
"""rollback.fullDeadlineSeconds, where nobody says otherwise."""
_TEMPORARY = ".tmp-"
log = logging.getLogger(__name__)


class Store:
    """Checkpoints of one run as one attempt sees them. Safe for one saving thread beside others that call state()."""

    def __init__(
        self,
        root: Path,
        *,
        run_uid: str,
        attempt: int,
        retention: Retention | None = None,
        verification: str = "Checksum",
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        disk: Disk | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        if verification not in ("None", "Checksum", "Load"):
            raise CheckpointError(f"verification is {verification!r}; known are None, Checksum, Load")
        self.volume = Volume(root, run_uid=run_uid, attempt=attempt)
        self.retention = retention or Retention()
        self.verification = verification
        self.max_file_bytes = max_file_bytes
        """Larger groups of tensors are split into files of at most so much; see shards."""
        self.deadline_s = FULL_DEADLINE_S
        """Of a full rollback."""
        self.period_s: float | None = None
        """Between two saves, as the cadence asks for them; None while that is not known."""
        self.context: Mapping[str, str] = {}
        """What runs: code, model, device. In every manifest, and once per process in the log."""
        self.room: Room = fresh
        """Where loads put what they read."""
        self.probe: Probe | None = None
        """What is known of the volume, after prepare()."""
        self._clock = clock
        self._monotonic = monotonic
        self._disk = disk or Disk()
        self._ledger: Ledger | None = None
        self._lock = threading.Lock()
        self._known: dict[tuple[int, int], Generation] = {}
        self._corrupt: list[str] = []
        self._last_error = ""
        self._obstacles: dict[str, str] | None = None
        self._reads, self._writes = Rate(), Rate()
        self._ages_from = (clock(), monotonic())

    def prepare(self) -> None:
        """Claims the directory, tries what it can do, removes what interrupted saves left, and learns what is there.

        CheckpointDirError when the directory cannot be used or another run owns it.
        """
        self.volume.claim()
        self.probe = self._tried()
        self._disk.dsync = self.probe.mode is Durability.DSYNC
        self._remove_remnants()
        for attempt, directory in directories(self.volume.run_dir):
            self._learn(attempt, directory)
        newest = max((g.aged_at for g in self._known.values() if not g.corrupt), default=0.0)
        self._ages_from = (max(self._clock(), newest), self._monotonic())

    def _tried(self) -> Probe:
        try:
            return probe(self.volume.attempt_dir)
        except OSError as error:
            raise self.volume.unusable(error) from error

    def keep_log(self, wal: Wal) -> None:
        """Saves are transactions of this log from now on. Call after prepare(), with the log replayed.

        One that an earlier process left open is ended: committed when its generation is on the volume, else aborted.
        """
        ledger = Ledger(wal, attempt=self.volume.attempt)
        ledger.resolve(is_whole=self._is_whole)
        self._ledger = ledger

    def _is_whole(self, attempt: int, number: int, step: int) -> int | None:
        known = self._known.get((attempt, number))
        return known.files if known is not None and not known.corrupt and known.step == step else None

    def _remove_remnants(self) -> None:
        """Deletes what interrupted saves and deletions left, of this attempt and of those it supersedes."""
        owned = [attempt for attempt in self.volume.attempts() if attempt <= self.volume.attempt]
        for place in (self.volume.run_dir, *(self.volume.run_dir / f"a{attempt:05d}" for attempt in owned)):
            for entry in place.iterdir():
                if entry.name.startswith(_TEMPORARY):
                    log.info("removing what an interrupted writer left: %s", entry)
                    _clean_up(entry)

    def _learn(self, attempt: int, directory: Path) -> None:
        number = manifests.number_of(directory.name)
        assert number is not None
        where = place_of(directory)
        try:
            found = manifests.read(directory, run_uid=self.volume.run_uid, attempt=attempt, where=where)
            generation = generation_of(found, directory)
        except CorruptFileError as error:
            self._note_corrupt(str(error))
            generation = Generation(
                attempt=attempt, number=number, step=0, epoch=0, path=directory, size_bytes=0, created=0, corrupt=True
            )
        with self._lock:
            self._known[generation.key] = generation

    # Saving

    def save(self, data: GenerationData) -> Generation:
        """Writes one generation, verifies it as asked, commits it, then deletes what retention no longer keeps.

        SaveError when that failed; nothing of this save is left then and older generations are untouched.
        """
        try:
            generation = self._save(data)
        except OSError as error:
            raise self._failed(data, f"{error}", error.errno) from error
        except CorruptFileError as error:
            raise self._failed(data, f"read back wrong: {error}", errno.EIO) from error
        except SupersededError:
            raise
        except CheckpointError as error:
            raise self._failed(data, str(error), getattr(error, "errno", None)) from error
        with self._lock:
            self._last_error = ""
        return generation

    def _failed(self, data: GenerationData, why: str, number: int | None) -> SaveError:
        message = f"checkpoint of step {data.step} was not saved: {why}"
        with self._lock:
            self._last_error = message
            if number in (errno.ENOSPC, errno.EDQUOT):
                self._obstacles = {**(self._obstacles or {}), "space": message}
        return SaveError(message, errno=number, path=self.volume.attempt_dir)

    def _save(self, data: GenerationData) -> Generation:
        newer = self.volume.superseded_by()
        if newer is not None:
            raise SupersededError(f"attempt {newer} owns {self.volume.run_dir}; attempt {self.volume.attempt} is over")
        begun = self._monotonic()
        number = 1 + max(numbers(self.volume.run_dir), default=0)
        txn = self._begin(number, data)
        try:
            manifest, final = self._write(number, data, txn)
        except (OSError, CheckpointError, MemoryError) as error:
            if self._ledger is not None and txn is not None:
                self._ledger.abort(txn, str(error))
            raise
        # With verification None the write protocol itself is trusted, else nothing could ever be deleted.
        generation = replace(generation_of(manifest, final), verified=True)
        with self._lock:
            self._known[generation.key] = generation
        if self._commit(txn, generation):
            self._retain()
        self._measure(generation, self._monotonic() - begun)
        return generation

    def _begin(self, number: int, data: GenerationData) -> int | None:
        if self._ledger is None:
            return None
        return self._ledger.begin(number=number, step=data.step, epoch=data.epoch, context=self._context())

    def _commit(self, txn: int | None, generation: Generation) -> bool:
        """False when the log did not take it: the checkpoint is there, but nothing older may go yet."""
        if self._ledger is None or txn is None:
            return True
        return self._ledger.commit(txn, number=generation.number, step=generation.step, files=generation.files)

    def _write(self, number: int, data: GenerationData, txn: int | None) -> tuple[Manifest, Path]:
        """The generation under its final name, durable and verified. After an error nothing of it is left."""
        draft = self.volume.attempt_dir / f"{_TEMPORARY}{manifests.directory_name(number)}"
        final = self.volume.attempt_dir / manifests.directory_name(number)
        try:
            if draft.exists():
                remove_tree(draft)
            draft.mkdir()
            begun = self._monotonic()
            manifest = write(draft, data, self._header(number, data, txn), self._disk, self.max_file_bytes)
            written = self._monotonic()
            verify(draft, manifest, data, self.verification, self._disk)
            if self.verification != "None":
                self._reads.add(manifest.size_bytes, self._monotonic() - written)
            draft.rename(final)
            sync_directory(self.volume.attempt_dir)
        except (OSError, CheckpointError, MemoryError):
            _clean_up(draft)
            if final.exists():
                self._remove(final)
            raise
        self._writes.add(manifest.size_bytes, written - begun)
        return manifest, final

    def _header(self, number: int, data: GenerationData, txn: int | None) -> Manifest:
        """The manifest as far as it is known before the files are written."""
        with self._lock:
            parent = max((number for _, number in self._known), default=None)
        since, at = self._ages_from
        return Manifest(
            run_uid=self.volume.run_uid,
            attempt=self.volume.attempt,
            number=number,
            parent=parent,
            step=data.step,
            epoch=data.epoch,
            created=round(self._clock(), 3),
            torch=torch.__version__,
            direct_io=self._disk.direct,
            verification=self.verification,
            metrics={name: float(value) for name, value in data.metrics.items() if math.isfinite(value)},
            files={},
            aged_at=round(since + self._monotonic() - at, 3),
            suspect=data.suspect or not data.sound(),
            durability=Durability.UNKNOWN if self.probe is None else self.probe.mode,
            txn=txn,
            context=self._context(),
        )

    def _context(self) -> dict[str, str]:
        known = {"torch": torch.__version__, **self.context}
        if self.probe is not None:
            known |= {"durability": self.probe.mode, "filesystem": self.probe.filesystem}
        return known

    def _measure(self, generation: Generation, seconds: float) -> None:
        """Asks whether the volume does for this state, now that it has shown what it can."""
        with self._lock:
            kept = [g for g in self._known.values() if not g.corrupt]
        try:
            volume = os.statvfs(self.volume.run_dir)
            free: int | None = volume.f_bavail * volume.f_frsize
        except OSError as error:
            log.warning("cannot ask for the free space of %s: %s", self.volume.run_dir, error)
            free = None
        demand = Demand(
            size_bytes=generation.size_bytes,
            count=len(kept),
            total_bytes=sum(g.size_bytes for g in kept),
            save_seconds=seconds,
            free_bytes=free,
            read_bytes_per_s=self._reads.bytes_per_s,
            deadline_seconds=self.deadline_s,
            period_seconds=self.period_s,
            rule=self.retention,
        )
        with self._lock:
            self._obstacles = obstacles(demand)

    @property
    def obstacles(self) -> Mapping[str, str]:
        """Why the volume does not do for this state, by kind, each with its numbers; see feasibility.obstacles."""
        with self._lock:
            return dict(self._obstacles or {})

    def _retain(self) -> None:
        with self._lock:
            owned = [g for g in self._known.values() if g.attempt <= self.volume.attempt]
            doomed = superfluous(owned, self.retention)
        for generation in doomed:
            if self._remove(generation.path):
                with self._lock:
                    del self._known[generation.key]

    def _remove(self, path: Path) -> bool:
        hidden = path.with_name(f"{_TEMPORARY}deleted-{path.name}")
        try:
            path.rename(hidden)  # one instant: never half a generation under its own name
            remove_tree(hidden)
        except OSError as error:
            log.warning("cannot delete %s: %s", path, error)
            return False
        return True

    # Loading

    def load_newest(
        self, resume_from: ResumeFrom | None = None, *, before_step: int | None = None, stop: Stop = go_on
    ) -> LoadedGeneration | None:
        """The newest generation of this run (older than `before_step`) that verifies; else what `resume_from` asks for.

        None when the run has no generation and nothing to resume from. NoValidCheckpointError when there are
        generations and none verifies, or when resumeFrom names what is not there. AbandonedError: `stop` said so.
        """
        loaded = self._search(self.volume.run_uid, before_step, stop).newest()
        if loaded is not None:
            self._loaded(loaded)
            return loaded
        return None if resume_from is None else self.load(resume_from, stop=stop)

    def load(self, source: ResumeFrom, *, before_step: int | None = None, stop: Stop = go_on) -> LoadedGeneration:
        """One generation of any run below this root: that of `source.step`, else by `source.select`.

        NoValidCheckpointError when there is none that verifies.
        """
        loaded = self._search(source.run_uid, before_step, stop).chosen(source, self.retention)
        if source.run_uid == self.volume.run_uid:
            self._loaded(loaded)
        return loaded

    def _search(self, run_uid: str, before_step: int | None, stop: Stop) -> Search:
        return Search(
            run_uid=run_uid,
            run_dir=self.volume.root / run_uid,
            disk=self._disk,
            noted=self._rejected,
            before_step=before_step,
            stop=stop,
            room=self.room,
            reads=self._reads,
            monotonic=self._monotonic,
        )

    def _rejected(self, entry: Entry, why: str) -> None:
        self._note_corrupt(why)
        with self._lock:
            known = self._known.get((entry.attempt, manifests.number_of(entry.path.name) or 0))
            if known is not None and known.path == entry.path:
                self._known[known.key] = replace(known, corrupt=True, verified=False)

    def _loaded(self, loaded: LoadedGeneration) -> None:
        with self._lock:
            known = self._known.get((loaded.attempt, loaded.number))
            if known is not None:
                self._known[known.key] = replace(known, verified=True)

    # Reporting

    def _note_corrupt(self, message: str) -> None:
        with self._lock:
            if message not in self._corrupt:
                self._corrupt = [message, *self._corrupt][:MAX_CORRUPT_LISTED]

    def state(self) -> CheckpointState:
        """What a report says about checkpoints. last_stall_ms is the trainer's to fill in. Never touches the disk."""
        with self._lock:
            sound = sorted((g for g in self._known.values() if not g.corrupt), key=lambda g: g.key)
            state = CheckpointState(
                count=len(sound),
                total_bytes=sum(g.size_bytes for g in sound),
                last_error=self._last_error,
                corrupt_files=self._corrupt,
            )
            if self._obstacles is not None:
                state.feasible = not self._obstacles
        if not sound:
            return state
        state.latest_step = sound[-1].step
        state.last_saved_time.FromMilliseconds(int(sound[-1].created * 1000))
        verified = [g for g in sound if g.verified]
        if verified:
            state.latest_verified_step = verified[-1].step
        leader = best(sound, self.retention, 1)
        if leader:
            state.best_step = leader[0].step
        return state

    # Export

    def export(self, tensors: Tensors, meta: Mapping[str, Any]) -> Path:
        """Writes the finished model as model.safetensors (see shards) with model.json beside it; gives their directory.

        The directory appears whole; one of an earlier completion is replaced. SaveError when that failed.
        """
        draft = self.volume.run_dir / f"{_TEMPORARY}export-a{self.volume.attempt:05d}"
        final = self.volume.export_dir
        try:
            if draft.exists():
                remove_tree(draft)
            draft.mkdir()
            write_export(draft, tensors, meta, self._disk, self.max_file_bytes)
            if final.exists():
                aside = final.with_name(f"{_TEMPORARY}export-replaced")
                if aside.exists():
                    remove_tree(aside)
                final.rename(aside)
                draft.rename(final)
                remove_tree(aside)
            else:
                draft.rename(final)
            sync_directory(self.volume.run_dir)
        except (OSError, CheckpointError) as error:
            _clean_up(draft)
            number = error.errno if isinstance(error, OSError) else None
            raise SaveError(f"the model was not exported: {error}", errno=number, path=final) from error
        return final


def _clean_up(path: Path) -> None:
    """Removes a remnant. Where that fails it stays hidden, takes room, and is tried again by the next prepare()."""
    try:
        remove_tree(path)
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error)
