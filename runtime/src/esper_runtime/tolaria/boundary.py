"""The end of an epoch: validation, the word of Tamiyo, a checkpoint when it is worth one, new settings.

The boundary proper is measured: from when validation has returned and the device is idle to when the next epoch may
begin. Over budget it is counted, told and held against a breaker; it is never an error.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from esper_leyline.exitcodes import ExitCode
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import RunConfig, RunConfigError, parse
from esper_leyline.v1 import report_pb2 as pb

from esper_runtime.tolaria import budget
from esper_runtime.tolaria.budget import BoundaryTimes, Stopwatch
from esper_runtime.tolaria.commands import NOTHING, Commands, Obeyed
from esper_runtime.tolaria.consult import Consult
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.handshake import Boundary as Handshake
from esper_runtime.tolaria.handshake import BoundaryResult
from esper_runtime.tolaria.judge import Call, Verdict, judge_validation
from esper_runtime.tolaria.learning_rate import LearningRate
from esper_runtime.tolaria.memory import Memory
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.packet import ClosedEpoch, Packets
from esper_runtime.tolaria.rollback import Rollbacks
from esper_runtime.tolaria.stability import Part, Standing
from esper_runtime.tolaria.state import Best, EpochSums, TrainState, parameter_count
from esper_runtime.tolaria.telemetry import Events, Heart, named
from esper_runtime.tolaria.validate import evaluate
from esper_runtime.workload import Workload


@dataclass(kw_only=True)
class EpochEnd:
    """Closes epochs."""

    workload: Workload
    config: RunConfig
    config_file: Path
    device: torch.device
    checkpoints: Checkpoints
    memory: Memory
    rollbacks: Rollbacks
    learning_rate: LearningRate
    commands: Commands
    consult: Consult
    packets: Packets
    standing: Standing
    registry: Metrics
    events: Events
    heart: Heart
    between_batches: Callable[[], Outcome | None]
    monotonic: Callable[[], float] = time.monotonic
    clock_ns: Callable[[], int] = time.perf_counter_ns
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the epoch closed last."""
    times: BoundaryTimes | None = None
    """Of the boundary before."""
    beside_ms: dict[str, float] = field(default_factory=dict)
    """What the last boundary led to, timed by itself: checkpoint, settings, trouble, rollback, halt."""

    def __post_init__(self) -> None:
        self._epoch_began = self.monotonic()
        self._config_text = self.config_file.read_text(encoding="utf-8")

    @property
    def handshake(self) -> Handshake | None:
        return self.consult.handshake

    def close(self, state: TrainState) -> Outcome | None:
        """Moves on to the next epoch, unless training has to end or goes back to an earlier one."""
        took_s = self.monotonic() - self._epoch_began
        measured = self._validate(state)
        if isinstance(measured, Outcome):
            return measured
        self.metrics = measured
        self.learning_rate.observe(comparable(measured), step=state.step, epoch=state.epoch)
        self.events.epoch(self._progress(state, took_s))
        closed = self._closed(state, took_s)
        worse = self._compared(state)
        state.loader.next_epoch()
        state.sums = EpochSums()
        self.beside_ms = {}
        self._beside("checkpoint", lambda: self._keep(state))
        self._beside("settings", lambda: self._reread_config(state))
        step = state.step
        outcome = self._boundary(state, closed)
        if outcome is None and worse is not None and state.step == step:  # else Tamiyo has led it back already
            outcome = self._beside("rollback", lambda: self.rollbacks.regressed(state, worse))
        self._epoch_began = self.monotonic()
        return outcome

    # The boundary

    def _boundary(self, state: TrainState, closed: ClosedEpoch) -> Outcome | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        watch = Stopwatch(self.clock_ns)
        with watch.part("assembly"):
            packet = self.packets.assemble(state, closed)
        with watch.part("tamiyo"):
            result = self.consult.ask(packet)
        with watch.part("apply"):
            obeyed = NOTHING if result is None or result.command is None else self.commands.obey(result.command, state)
        with watch.part("guard"):
            sound = True if result is None else self.consult.account(result)
        times = self._passed(watch.stop(), result)
        self._beside("trouble", lambda: self._judge(times, result, sound, obeyed))
        outcome = None if obeyed.afterwards is None else self._beside("rollback", obeyed.afterwards)
        return outcome if outcome is not None else self._beside("halt", lambda: self.halted(state))

    def _passed(self, times: BoundaryTimes, result: BoundaryResult | None) -> BoundaryTimes:
        """Publishes what the boundary took; the next packet tells Tamiyo."""
        self.times = times
        budget.publish(self.registry, times)
        self.packets.last = {"hook_latency_ms": times.total, "kasmina_apply_ms": times.parts["apply"]}
        if result is not None and result.timings.evaluate_ms is not None:
            self.packets.last["tamiyo_latency_ms"] = result.timings.evaluate_ms
        return times

    def _judge(self, times: BoundaryTimes, result: BoundaryResult | None, sound: bool | None, obeyed: Obeyed) -> None:
        """How the boundary went, for breakers and level. `sound`: see Consult.account."""
        if result is not None:
            self.consult.report(result)
        if times.guilty:
            message = f"the boundary took {times}"
            self.events.notice(RunReason.BOUNDARY_BUDGET_EXCEEDED, f"{times.guilty}: {message}", warning=True)
            self.standing.failed(Part.BOUNDARY_TIMING, f"{times.guilty}: {message}")
            sound = False
        elif sound is not None:
            self.standing.succeeded(Part.BOUNDARY_TIMING)
        if obeyed.failure:
            self.registry.add("tolaria.epochs.failed")
        self.standing.boundary(healthy=sound, failure=obeyed.failure)

    def _beside(self, name: str, work: Callable[[], Outcome | None]) -> Outcome | None:
        """Time that the boundary leads to and that is none of its own."""
        began = self.clock_ns()
        try:
            return work()
        finally:
            self.beside_ms[name] = (self.clock_ns() - began) / 1e6

    def halted(self, state: TrainState) -> Outcome | None:
        """The Outcome of level 4, the state saved when it is sound; None below. Asked before the first step too."""
        halt = self.standing.halt
        if halt is None:
            return None
        step = state.step
        self.events.transition(pb.RUNTIME_PHASE_HALTING, reason=halt.reason, message=halt.message, step=step)
        saved = None if state.judge.suspicious else self.checkpoints.save_now(state)
        message = f"{halt.message}: " + (f"saved step {saved}" if saved is not None else "nothing was saved for it")
        self.events.transition(pb.RUNTIME_PHASE_HALTED, reason=halt.reason, message=message, step=step)
        return Outcome(exit_code=ExitCode.HALTED, reason=halt.reason, message=message, saved_step=saved)

    def _closed(self, state: TrainState, took_s: float) -> ClosedEpoch:
        return ClosedEpoch(
            number=state.epoch + 1,
            took_s=took_s,
            sums=state.sums,
            metrics=self.metrics,
            whole=took_s > 0 and state.sums.steps == state.loader.batches_per_epoch,
        )

    # Measuring

    def _validate(self, state: TrainState) -> dict[str, float] | Outcome:
        metrics = {"train_loss": state.sums.loss / state.sums.samples} if state.sums.samples else {}
        if self.workload.validation is None:
            return metrics
        self.heart.validating = True
        began = self.monotonic()
        try:
            found = evaluate(
                self.workload, self.workload.validation, device=self.device, between_batches=self.between_batches
            )
        finally:
            self.heart.validating = False
            self.registry.set("tolaria.validation.latency_ms", (self.monotonic() - began) * 1e3)
        if isinstance(found, Outcome):
            return found
        return {**{f"validation_{name}": value for name, value in found.items()}, **metrics}

    def _progress(self, state: TrainState, took_s: float) -> pb.Progress:
        loader = state.loader
        progress = pb.Progress(
            epoch=state.epoch + 1,
            step=state.step,
            total_steps=self.heart.total_steps,
            metrics=named(self.metrics),
            total_epochs=self.workload.epochs,
            parameter_count=parameter_count(state.model),
        )
        if math.isfinite(state.loss):
            progress.loss = state.loss
        if took_s > 0 and state.sums.steps == loader.batches_per_epoch:
            progress.samples_per_second = state.sums.samples / took_s
        return progress

    # Keeping

    def _compared(self, state: TrainState) -> Verdict | None:
        """What to do about an epoch that is worse than the best one before; None when it is not."""
        retention = self.config.checkpoint.retention
        value = comparable(self.metrics).get(retention.metric)
        if value is None or state.best is None:
            return None
        verdict = judge_validation(
            self.config.health,
            name=retention.metric,
            mode=retention.mode,
            value=value,
            best=state.best.value,
            best_step=state.best.step,
        )
        return verdict if verdict.call is Call.BAD else None

    def _keep(self, state: TrainState) -> None:
        """A checkpoint of an epoch that is the best so far; others follow their cadence."""
        metrics = comparable(self.metrics)
        value = metrics.get(self.config.checkpoint.retention.metric)
        if value is None or not math.isfinite(value) or state.judge.suspicious:
            return
        sign = 1.0 if self.config.checkpoint.retention.mode == "Min" else -1.0
        if state.best is None or sign * value < sign * state.best.value:
            state.best = Best(value=value, step=state.step, epoch=state.epoch)
            self.checkpoints.submit(state, metrics)

    # Settings

    def _reread_config(self, state: TrainState) -> None:
        """Health, rollback and checkpoint cadence may change while a run trains."""
        try:
            text = self.config_file.read_text(encoding="utf-8")
        except OSError as error:
            self.events.notice(RunReason.CONFIG_CHANGED, f"run.json cannot be read any more: {error}", warning=True)
            return
        if text == self._config_text:
            return
        self._config_text = text
        try:
            new = parse(text)
        except RunConfigError as error:
            self.events.notice(RunReason.CONFIG_CHANGED, f"new run.json ignored: {error}", warning=True)
            return
        old, self.config = self.config, new
        changed = [part for part in ("checkpoint", "health", "rollback") if getattr(old, part) != getattr(new, part)]
        state.judge.configure(new.health)
        self.rollbacks.config = new.rollback
        self.checkpoints.configure(new.checkpoint, new.rollback)
        self.memory.config = new.checkpoint
        if changed:
            self.events.notice(
                RunReason.CONFIG_CHANGED, f"{', '.join(changed)}: new settings from step {state.step + 1}"
            )


def comparable(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics under every name that retention.metric may use: "loss" and "accuracy" are those of validation."""
    short = {name.removeprefix("validation_"): value for name, value in metrics.items()}
    if "loss" not in short and "train_loss" in metrics:
        short["loss"] = metrics["train_loss"]
    return {**short, **metrics}
