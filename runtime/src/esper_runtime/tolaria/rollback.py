"""Rolls training back inside the process: in-place copies, verified, counted, within a budget.

The target is a state from before the first suspect step; the batches of all suspect steps are skipped for good. What
a rollback changes for ever (its count, the skipped batches, the learning-rate scale) goes into the run's log.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from esper_leyline.exitcodes import ExitCode
from esper_leyline.phases import RollbackTier
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Rollback
from esper_leyline.v1 import common_pb2
from esper_leyline.v1 import report_pb2 as pb

from esper_runtime.checkpoint.wal import Kind
from esper_runtime.checkpoint.walstate import MAX_REMEMBERED
from esper_runtime.tolaria.data import Position
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.judge import LEFT_OUT, Call, Verdict
from esper_runtime.tolaria.memory import Memory, Unsound
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.restore import NotRestored, Restored, Tiers
from esper_runtime.tolaria.stability import Stability
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.telemetry import Events

_NOT_FINITE = frozenset({RunReason.NON_FINITE_LOSS, RunReason.NON_FINITE_GRADIENT})
_TIERS = {RollbackTier.FAST: common_pb2.ROLLBACK_TIER_FAST, RollbackTier.FULL: common_pb2.ROLLBACK_TIER_FULL}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trouble:
    """Why and from where to roll back."""

    cause: RunReason
    message: str
    at_step: int
    """The step that was refused, or after which a rollback was asked for."""
    first_suspect: int
    """Targets are older than this step."""
    poisoned: tuple[Position, ...]
    """Batches of the suspect steps."""
    began_ns: int
    """CLOCK_MONOTONIC when the first bad value existed."""
    detected_ns: int
    target: str = ""
    """In the place of rollback.target."""


class Rollbacks:
    """`on_rolled_back` is told after each one."""

    def __init__(
        self,
        *,
        config: Rollback,
        memory: Memory,
        checkpoints: Checkpoints,
        facts: Facts,
        events: Events,
        metrics: Metrics,
        stability: Stability,
        monotonic: Callable[[], float] = time.monotonic,
        on_rolled_back: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self._memory = memory
        self._checkpoints = checkpoints
        self._facts = facts
        self._events = events
        self._metrics = metrics
        self._stability = stability
        self._monotonic = monotonic
        self._tiers = Tiers(
            memory=memory, checkpoints=checkpoints, facts=facts, events=events, metrics=metrics, monotonic=monotonic
        )
        self._on_rolled_back = on_rolled_back
        self._suspects: list[Position] = []
        self._began_ns = 0

    def after_step(self, state: TrainState, verdict: Verdict, *, evaluated_ns: int, judged_ns: int) -> Outcome | None:
        """Follows the verdicts; an Outcome when training has to end."""
        if verdict.call is Call.GOOD:
            if self._suspects:
                self._suspects.clear()
            return None
        if not self._suspects:
            self._began_ns = evaluated_ns
        self._suspects.append(state.loader.current)
        if verdict.call is Call.DISCARD:
            self._suspects.pop()
            if verdict is not LEFT_OUT:
                self._leave_out(state, verdict)
            return None
        if verdict.call is Call.SUSPECT:
            return None
        assert verdict.reason is not None
        # Weights that were broken by an earlier step make every batch look bad: that step is to blame.
        broken = self._memory.check(state) if verdict.reason in _NOT_FINITE else None
        earlier = () if broken is None else broken.batches
        first_suspect = verdict.first_suspect if broken is None else min(broken.first_suspect, verdict.first_suspect)
        trouble = Trouble(
            cause=verdict.reason,
            message=verdict.message,
            at_step=state.step + 1,
            first_suspect=first_suspect,
            poisoned=tuple(dict.fromkeys((*earlier, *self._suspects))),
            began_ns=self._began_ns,
            detected_ns=judged_ns,
        )
        return self._act(state, trouble, verdict)

    def unsound(self, state: TrainState, found: Unsound) -> Outcome | None:
        """A state that was applied is not finite; an Outcome when training has to end."""
        verdict = state.judge.unsound(state.step, found.message)
        if verdict.call is not Call.BAD:
            return None  # health.nonFiniteAction is Ignore: training goes on, without this snapshot
        assert verdict.reason is not None
        now_ns = time.monotonic_ns()
        trouble = Trouble(
            cause=verdict.reason,
            message=found.message,
            at_step=state.step,
            first_suspect=min(found.first_suspect, verdict.first_suspect),
            poisoned=found.batches,
            began_ns=now_ns,
            detected_ns=now_ns,
        )
        return self._act(state, trouble, verdict)

    def regressed(self, state: TrainState, verdict: Verdict) -> Outcome | None:
        """An epoch ended worse than the best one, whose checkpoint is the target; no batch is to blame for it."""
        assert verdict.reason is not None
        now_ns = time.monotonic_ns()
        trouble = Trouble(
            cause=verdict.reason,
            message=verdict.message,
            at_step=state.step,
            first_suspect=verdict.first_suspect,
            poisoned=(),
            began_ns=now_ns,
            detected_ns=now_ns,
            target="Best",
        )
        return self._act(state, trouble, verdict)

    def _act(self, state: TrainState, trouble: Trouble, verdict: Verdict) -> Outcome | None:
        self._suspects.clear()
        with self._events.incident():
            self._stability.anomaly(trouble.cause, trouble.message)
            if verdict.action == "Halt":
                return self._end(state, trouble, ExitCode.HALTED, trouble.cause, trouble.message)
            return self.roll_back(state, trouble)

    def _leave_out(self, state: TrainState, verdict: Verdict) -> None:
        assert verdict.reason is not None
        loader = state.loader
        if len(loader.left_out) >= MAX_REMEMBERED:
            loader.left_out.remove(min(loader.left_out))
        loader.left_out.add(loader.current)
        self._facts.record(Kind.SKIP, positions=[loader.number(loader.current)], left_out=True)
        self._events.notice(verdict.reason, f"{verdict.message}; the step was not applied", warning=True)

    def roll_back(self, state: TrainState, trouble: Trouble) -> Outcome | None:
        """In place. An Outcome when the budget is used up or there is nothing to go back to.

        TornStateError when the live state is beyond use: the process must end, and a new one starts from memory or
        volume.
        """
        with self._events.incident():
            return self._go_back(state, trouble)

    def _go_back(self, state: TrainState, trouble: Trouble) -> Outcome | None:
        began = self._monotonic()
        config = dataclasses.replace(self.config, target=trouble.target) if trouble.target else self.config
        used = self._facts.rollbacks_within(config.window_seconds)
        if used >= config.max_rollbacks:
            limit = f"rollback.maxRollbacks within {config.window_seconds} s of training"
            why = f"{used} rollbacks, {limit}; {trouble.message}"
            return self._exhausted(state, trouble, RunReason.ROLLBACKS_EXHAUSTED, why)
        self._metrics.add("tolaria.rollbacks_initiated_total")
        self._events.transition(
            pb.RUNTIME_PHASE_ROLLING_BACK, reason=trouble.cause, message=trouble.message, step=state.step
        )
        restored = self._tiers.restore(
            state, before_step=trouble.first_suspect, cause=trouble.cause, config=config, began=began
        )
        if isinstance(restored, NotRestored):
            return self._nowhere_to_go(state, trouble, restored)
        self._rolled_back(state, trouble, restored)
        return None

    def _rolled_back(self, state: TrainState, trouble: Trouble, restored: Restored) -> None:
        step = restored.step
        self._remember(state, trouble, trouble.at_step, step)
        self._on_rolled_back()
        self._metrics.add("tolaria.rollbacks_succeeded_total")
        self._events.recovery(_recovery(trouble, restored))
        message = f"back at step {step}" + (", later than it should be" if restored.late else "")
        self._stability.rolled_back(trouble.cause, message)
        self._events.transition(pb.RUNTIME_PHASE_RUNNING, reason=RunReason.ROLLED_BACK, message=message, step=step)
        if self._checkpoints.store.state().latest_step >= trouble.first_suspect:
            self._checkpoints.submit(state, {})  # else a new pod would go on from what was given up

    def _nowhere_to_go(self, state: TrainState, trouble: Trouble, failed: NotRestored) -> Outcome:
        if failed.nothing_there:
            why = f"nothing to roll back to from step {trouble.at_step} ({failed}): {trouble.message}"
            return self._exhausted(state, trouble, RunReason.ROLLBACKS_EXHAUSTED, why)
        why = f"no state could be restored from step {trouble.at_step} ({failed}): {trouble.message}"
        return self._exhausted(state, trouble, RunReason.RESTORE_FAILED, why)

    def _remember(self, state: TrainState, trouble: Trouble, from_step: int, to_step: int) -> None:
        loader, factor = state.loader, self.config.learning_rate_scale
        skipped = trouble.poisoned if self.config.skip_batches == "Anomalous" else ()
        loader.skipped.update(skipped)
        state.learning_rate_scale *= factor
        self._facts.rolled_back(
            cause=trouble.cause,
            from_step=from_step,
            to_step=to_step,
            skipped=[loader.number(position) for position in skipped],
            scale=state.learning_rate_scale if factor != 1.0 else None,
        )
        if factor != 1.0:
            self._tell_scaled(state, factor, "after a rollback")

    def scale_learning_rate(self, state: TrainState, factor: float, why: str) -> None:
        """For good."""
        state.learning_rate_scale *= factor
        self._facts.record(Kind.LEARNING_RATE, scale=state.learning_rate_scale)
        self._tell_scaled(state, factor, why)

    def _tell_scaled(self, state: TrainState, factor: float, why: str) -> None:
        message = f"learning rate times {factor:g} {why}: now {state.learning_rate_scale:g} of its schedule"
        self._events.notice(RunReason.LEARNING_RATE_SCALED, message)

    def _exhausted(self, state: TrainState, trouble: Trouble, reason: RunReason, why: str) -> Outcome:
        code = ExitCode.HALTED if self.config.on_exhausted == "Halt" else ExitCode.ROLLBACK_EXHAUSTED
        return self._end(state, trouble, code, reason, why)

    def _end(self, state: TrainState, trouble: Trouble, code: ExitCode, reason: RunReason, message: str) -> Outcome:
        """Leaves a checkpoint of the last good state behind, when memory has one that the volume has not."""
        halted = code is ExitCode.HALTED
        if halted:
            self._stability.halted(reason, message)
        phase = pb.RUNTIME_PHASE_HALTING if halted else pb.RUNTIME_PHASE_STOPPING
        self._events.transition(phase, reason=reason, message=message, step=state.step)
        saved = self._keep_good(state, before_step=trouble.first_suspect)
        if halted:
            self._events.transition(pb.RUNTIME_PHASE_HALTED, reason=reason, message=message, step=state.step)
        return Outcome(exit_code=code, reason=reason, message=message, saved_step=saved)

    def _keep_good(self, state: TrainState, *, before_step: int) -> int | None:
        """Puts the last good state of memory on the volume, unless that has it or a newer one; the step of what it has.

        None when memory has none, or when it cannot be saved. What the volume has is known to be good when the step
        after it was: that one was computed with its weights.
        """
        self._checkpoints.wait()
        _, good = self._memory.restore_good(state, before_step=before_step)
        if good is None:
            return None
        newest = self._checkpoints.store.state().latest_step
        return newest if good <= newest < before_step - 1 else self._checkpoints.save_now(state)


def _recovery(trouble: Trouble, restored: Restored) -> pb.Recovery:
    now_ns, now = time.monotonic_ns(), time.time_ns()
    recovery = pb.Recovery(
        kind=pb.RECOVERY_KIND_IN_PROCESS,
        cause=trouble.cause,
        from_step=trouble.at_step,
        to_step=restored.step,
        detect_ms=(trouble.detected_ns - trouble.began_ns) / 1e6,
        recover_ms=(now_ns - trouble.detected_ns) / 1e6,
        verified=True,
        tier=_TIERS[restored.tier],
    )
    recovery.detected_time.FromNanoseconds(now - (now_ns - trouble.detected_ns))
    recovery.completed_time.FromNanoseconds(now)
    return recovery
