"""Which generation to go back to: the first in order of preference that verifies, byte for byte.

Loads give memory that is nobody else's and touch nothing that lives. What does not verify is told to `noted` and
passed over.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from esper_leyline.runconfig import ResumeFrom, Retention

from esper_runtime.checkpoint.catalog import Entry, generation_of, newest_first
from esper_runtime.checkpoint.errors import CorruptFileError, NoValidCheckpointError
from esper_runtime.checkpoint.feasibility import Rate
from esper_runtime.checkpoint.files import Disk, Stop, go_on
from esper_runtime.checkpoint.generation import LoadedGeneration, Room, fresh, read
from esper_runtime.checkpoint.retention import best

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Search:
    """One search for a generation. `corrupt` collects what did not verify, newest first."""

    run_uid: str
    run_dir: Path
    disk: Disk
    noted: Callable[[Entry, str], None]
    """Told of each generation that does not verify, and why."""
    before_step: int | None = None
    """Only generations of an earlier step, and only good ones: the search is for a rollback."""
    stop: Stop = go_on
    room: Room = fresh
    """Where to load it."""
    reads: Rate = field(default_factory=Rate)
    """Learns how fast the volume was."""
    monotonic: Callable[[], float] = time.monotonic
    corrupt: list[str] = field(default_factory=list)
    seen: int = 0
    """Generations looked at, whatever became of them."""
    suspects: list[Entry] = field(default_factory=list)
    """Saved under suspicion, newest first: taken when nothing good is left."""

    def newest(self) -> LoadedGeneration | None:
        """The newest that verifies; None when there is none at all. NoValidCheckpointError: none verifies."""
        loaded = self._first(self._good())
        if loaded is None and self.before_step is None:
            loaded = self._first(iter(self.suspects))
        if loaded is None and self.corrupt:
            raise NoValidCheckpointError(
                f"none of {self.seen} checkpoints below {self.run_dir} verifies",
                tuple(self.corrupt),
            )
        return loaded

    def chosen(self, source: ResumeFrom, rule: Retention) -> LoadedGeneration:
        """That of `source.step`, else by `source.select`. NoValidCheckpointError when there is none."""
        loaded = self._first(self._order(source, rule))
        if loaded is None:
            asked = "" if source.step is None else f" at step {source.step}"
            raise NoValidCheckpointError(
                f"checkpoint.resumeFrom: run {source.run_uid} has no valid checkpoint{asked} below {self.run_dir}",
                tuple(self.corrupt),
            )
        return loaded

    def _first(self, preferred: Iterator[Entry]) -> LoadedGeneration | None:
        for entry in preferred:
            loaded = self._load(entry)
            if loaded is not None:
                return loaded
        return None

    def _good(self) -> Iterator[Entry]:
        """Of the sound ones those without suspicion."""
        for entry in self._sound():
            if entry.manifest is not None and entry.manifest.suspect:
                self.suspects.append(entry)
            else:
                yield entry

    def _sound(self) -> Iterator[Entry]:
        """With a manifest that can be believed and of an early enough step, newest first."""
        for entry in newest_first(self.run_dir, self.run_uid):
            self.seen += 1
            if entry.manifest is None:
                self._reject(entry, entry.problem)
            elif self.before_step is None or entry.manifest.step < self.before_step:
                yield entry

    def _order(self, source: ResumeFrom, rule: Retention) -> Iterator[Entry]:
        if source.step is not None:
            return (
                entry for entry in self._sound() if entry.manifest is not None and entry.manifest.step == source.step
            )
        return self._best_first(rule) if source.select == "Best" else self._good_first()

    def _good_first(self) -> Iterator[Entry]:
        yield from self._good()
        yield from self.suspects

    def _best_first(self, rule: Retention) -> Iterator[Entry]:
        sound = {entry.path: entry for entry in self._good()}
        known = [generation_of(entry.manifest, path) for path, entry in sound.items() if entry.manifest is not None]
        yield from (sound[generation.path] for generation in best(known, rule, len(known)))

    def _load(self, entry: Entry) -> LoadedGeneration | None:
        found = entry.manifest
        assert found is not None
        begun = self.monotonic()
        try:
            tensors, state = read(entry.path, found, entry.where, self.disk, self.stop, self.room)
        except CorruptFileError as error:
            why = str(error)  # the error itself holds on to the memory that was read into
            log.error("checkpoint does not verify, trying an older one: %s", why)
            self._reject(entry, why)
            return None
        self.reads.add(found.size_bytes, self.monotonic() - begun)
        return LoadedGeneration(
            tensors=tensors,
            state=state,
            epoch=found.epoch,
            step=found.step,
            attempt=entry.attempt,
            number=found.number,
            metrics=found.metrics,
            corrupt=tuple(self.corrupt),
        )

    def _reject(self, entry: Entry, why: str) -> None:
        self.corrupt.append(why)
        self.noted(entry, why)
