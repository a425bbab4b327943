"""Checkpoints as the trainer sees them: when to save, what to say about it, and how to wait without looking dead.

Saving costs the training thread one copy on the host; a thread writes. A save that fails never stops training: it is
counted, reported, and tried again at the next cadence.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from esper_leyline.phases import Durability, RestoreOutcome
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Checkpoint, ResumeFrom, Rollback
from esper_leyline.v1 import report_pb2 as pb
from torch import Tensor

from esper_runtime.checkpoint import (
    CheckpointError,
    LoadedGeneration,
    NoValidCheckpointError,
    SaveOutcome,
    Store,
    Writer,
)
from esper_runtime.checkpoint.files import Stop
from esper_runtime.checkpoint.host import HostCopies
from esper_runtime.checkpoint.wal import Kind
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.judge import Call, Verdict
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.stability import Calm, Part, Stability
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.telemetry import Events

COMPONENT = "checkpoint"
BEAT_S = 0.05
SETTLE_SHARE = 0.25
"""Of a load's deadline, to wait for a save under way."""
T = TypeVar("T")
_MODES = {Durability.UNKNOWN: 0, Durability.DSYNC: 1, Durability.FSYNC: 2}
log = logging.getLogger(__name__)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Checkpoints:
    """`beat` is called while waiting for the disk."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        *,
        config: Checkpoint,
        facts: Facts,
        events: Events,
        beat: Callable[[], None],
        metrics: Metrics | None = None,
        stability: Stability | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.config = config
        self._writer = writer
        self._facts = facts
        self._events = events
        self._beat = beat
        self._monotonic = monotonic
        self._metrics = metrics or Metrics(None)
        self._stability = stability or Calm()
        self._copies = HostCopies(limit=store.max_file_bytes)
        self._due_at: float | None = None
        self._owed = False
        """A save fell due that has not been handed over: the disk was busy, or the state was not known to be good."""
        self._told: set[str] = set()
        """Obstacles that this process has told of."""
        self._submitted_at = monotonic()
        self._saved_at: float | None = None
        self._outstanding = 0
        self._stall_ms: float | None = None
        self._degraded = False
        self.saved_step: int | None = None
        """Of the newest save that this process completed."""
        self.sealed = False
        """The live model is no training state any more: nothing of it is to be saved."""
        self.store.period_s = config.period_seconds
        self.store.room = self._copies.lend
        self._announce_durability()

    def configure(self, config: Checkpoint, rollback: Rollback | None = None) -> None:
        """New cadence, retention and deadline."""
        if (config.every_steps, config.period_seconds) != (self.config.every_steps, self.config.period_seconds):
            self._due_at, self.store.period_s, self._owed = None, config.period_seconds, False
        self.config = config
        self.store.retention = config.retention
        if rollback is not None:
            self.store.deadline_s = rollback.full_deadline_seconds

    def _announce_durability(self) -> None:
        found = self.store.probe
        if found is None:
            return
        self._metrics.set("tolaria.checkpoint.durability_mode", _MODES[found.mode])
        if found.doubts:
            message = f"{self.store.volume.root}: what is saved may be lost: {'; '.join(found.doubts)}"
            self._events.notice(RunReason.CHECKPOINT_NOT_DURABLE, message, warning=True)

    # When

    def after_step(self, state: TrainState, verdict: Verdict) -> None:
        if self._outstanding:
            self._report()
        self._owed = self._due(state.step) or self._owed
        if not self._owed or verdict.call is not Call.GOOD:
            return
        if self._saved_at is not None:
            self._metrics.set("tolaria.checkpoint.age_s", self._monotonic() - self._saved_at)
        if not self._outstanding:
            self.submit(state, {})

    def _due(self, step: int) -> bool:
        every, period = self.config.every_steps, self.config.period_seconds
        if every is not None and step % every == 0:
            self._observe_cadence()
            return True
        return period is not None and self._monotonic() - self._submitted_at >= period

    def _observe_cadence(self) -> None:
        """So many steps take so many seconds: that is how long a save may take."""
        now = self._monotonic()
        if self._due_at is not None:
            between = now - self._due_at
            self.store.period_s = min(between, self.config.period_seconds or between)
        self._due_at = now

    def submit(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Hands a copy of the state to the writer."""
        begun = self._submitted_at = self._monotonic()
        self._owed = False
        if not self._copies.free():
            self._writer.retract()  # the newest wins; its memory is needed
        try:
            data = state.generation(metrics, copy=self._copies.take)
        except (OSError, CheckpointError) as error:
            why = f"checkpoint of step {state.step} was not saved: {error}"
            self._failed(SaveOutcome(step=state.step, error=why, errno=getattr(error, "errno", None)))
            return
        self._outstanding += 1
        self._writer.submit(data)
        self._stall_ms = (self._monotonic() - begun) * 1e3

    def save_now(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> int | None:
        """Saves and waits; the step, or None when it failed. Once sealed: the step of the newest save."""
        if self.sealed:
            return self.saved_step
        self.submit(state, metrics or {})
        self.wait()
        return self.saved_step if self.saved_step == state.step else None

    def wait(self) -> None:
        """Until nothing is being written."""
        while not self._writer.drain(BEAT_S):
            self._beat()
        self._report()

    # What became of it

    def _report(self) -> None:
        for outcome in self._writer.poll():
            self._outstanding = max(0, self._outstanding - 1)
            if outcome.saved:
                self._saved(outcome)
            elif not outcome.replaced:
                self._failed(outcome)

    def _saved(self, outcome: SaveOutcome) -> None:
        self.saved_step = outcome.step
        self._saved_at = self._monotonic()
        self._metrics.set("tolaria.checkpoint.age_s", 0.0)
        self._facts.settle()
        self._stability.succeeded(Part.CHECKPOINT)
        self._measured(outcome)
        if self._degraded:
            self._degraded = False
            message = f"step {outcome.step} is saved"
            self._events.degradation(COMPONENT, degraded=False, reason=RunReason.CHECKPOINT_SAVED, message=message)
        self.report_state()

    def _failed(self, outcome: SaveOutcome) -> None:
        self._facts.record(Kind.CHECKPOINT_FAILURE, step=outcome.step, error=outcome.error[:512])
        self._metrics.add("tolaria.checkpoint.failures_total")
        self._stability.failed(Part.CHECKPOINT, outcome.error)
        full = outcome.errno in _FULL
        reason = RunReason.CHECKPOINT_VOLUME_FULL if full else RunReason.CHECKPOINT_FAILED
        remedy = "; enlarge the volume or lower checkpoint.retention" if full else ""
        self._degraded = True
        self._events.degradation(COMPONENT, degraded=True, reason=reason, message=outcome.error + remedy)
        self.report_state()

    def _measured(self, outcome: SaveOutcome) -> None:
        generation = outcome.generation
        assert generation is not None
        self._metrics.set("tolaria.checkpoint.duration_s", outcome.seconds)
        self._metrics.set("tolaria.checkpoint_duration_seconds", outcome.seconds)
        self._metrics.set("tolaria.checkpoint.bytes", generation.size_bytes)
        self._metrics.set("tolaria.checkpoint.generation", generation.number)
        if not generation.suspect:
            self._metrics.set("tolaria.checkpoint.last_good_epoch", generation.epoch)
        for kind, message in self.store.obstacles.items():
            if kind not in self._told:
                self._told.add(kind)
                self._events.notice(RunReason.CHECKPOINT_INFEASIBLE, message, warning=True)

    def report_state(self) -> None:
        state: pb.CheckpointState = self.store.state()
        if self._stall_ms is not None:
            state.last_stall_ms = self._stall_ms
        self._events.checkpoint(state)

    # Back again

    def load_first(self, resume_from: ResumeFrom | None) -> LoadedGeneration | None:
        """What a start goes on from; see Store.load_newest, also for its errors."""
        return self._beating(lambda: self.store.load_newest(resume_from))

    def load_newest(
        self, *, before_step: int | None = None, deadline_s: float | None = None
    ) -> tuple[RestoreOutcome, LoadedGeneration | None]:
        """The newest verified generation, older than `before_step`; see _load for the outcomes."""
        return self._load(lambda stop: self.store.load_newest(before_step=before_step, stop=stop), deadline_s)

    def load_best(
        self, *, before_step: int | None = None, deadline_s: float | None = None
    ) -> tuple[RestoreOutcome, LoadedGeneration | None]:
        """The best verified generation by retention.metric, older than `before_step`; see _load for the outcomes."""
        best = ResumeFrom(run_uid=self.store.volume.run_uid, select="Best")
        return self._load(lambda stop: self.store.load(best, before_step=before_step, stop=stop), deadline_s)

    def _load(
        self, work: Callable[[Stop], LoadedGeneration | None], deadline_s: float | None
    ) -> tuple[RestoreOutcome, LoadedGeneration | None]:
        """OK with what was loaded, into memory of its own; else why not, and None.

        NO_CHECKPOINT: none fits. INTEGRITY_FAILED: some exist, none verifies. DEADLINE_EXCEEDED: the volume took more
        than `deadline_s`; the load is told to stop and what it may still read is dropped.
        """
        ends = None if deadline_s is None else self._monotonic() + deadline_s
        self._settle(None if deadline_s is None else deadline_s * SETTLE_SHARE)
        abandoned = threading.Event()
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-load")
        load = executor.submit(work, abandoned.is_set)
        executor.shutdown(wait=False)  # takes no more work; the thread ends with this one
        while not wait((load,), BEAT_S).done:
            self._beat()
            if ends is not None and self._monotonic() >= ends:
                abandoned.set()  # it stops at the next chunk; nobody waits for that
                return RestoreOutcome.DEADLINE_EXCEEDED, None
        return _restored(load)

    def _settle(self, patience_s: float | None) -> None:
        """Lets a save under way become the newest generation, for at most so long."""
        if patience_s is None:
            self.wait()
            return
        ends = self._monotonic() + patience_s
        while not self._writer.drain(BEAT_S) and self._monotonic() < ends:
            self._beat()
        self._report()

    def export(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Writes the finished model. SaveError when that failed."""
        self._beating(lambda: self.store.export(tensors, meta))

    def _beating(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in a thread, because a disk may take longer than a sign of life may."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="volume") as executor:
            future = executor.submit(work)
            while not wait((future,), BEAT_S).done:
                self._beat()
            return future.result()

    def close(self, timeout_s: float) -> None:
        self._writer.close(timeout_s)


def _restored(load: "Future[LoadedGeneration | None]") -> tuple[RestoreOutcome, LoadedGeneration | None]:
    """What a finished load has come to."""
    try:
        loaded = load.result()
    except NoValidCheckpointError as error:
        return (RestoreOutcome.INTEGRITY_FAILED if error.corrupt else RestoreOutcome.NO_CHECKPOINT), None
    except OSError as error:
        log.error("the checkpoint volume cannot be read: %s", error)
        return RestoreOutcome.INTEGRITY_FAILED, None
    return (RestoreOutcome.NO_CHECKPOINT if loaded is None else RestoreOutcome.OK), loaded
