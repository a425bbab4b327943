"""The end of an epoch: validation, the word of Tamiyo, a checkpoint when it is worth one, new settings."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import RunConfig, RunConfigError, parse
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.telemetry_pb2 import HardwareContext, SystemStatePacket, TrainingMetrics

from esper_runtime.checkpoint.wal import Kind
from esper_runtime.tolaria.commands import Commands
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.handshake import Boundary as Handshake
from esper_runtime.tolaria.memory import Memory
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.rollback import Rollbacks
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
    commands: Commands
    handshake: Handshake | None
    facts: Facts
    events: Events
    heart: Heart
    between_batches: Callable[[], Outcome | None]
    monotonic: Callable[[], float] = time.monotonic
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the epoch closed last."""

    def __post_init__(self) -> None:
        self._epoch_began = self.monotonic()
        self._config_text = self.config_file.read_text(encoding="utf-8")

    def close(self, state: TrainState) -> Outcome | None:
        """Moves on to the next epoch, unless training has to end or goes back to an earlier one."""
        took_s = self.monotonic() - self._epoch_began
        measured = self._validate(state)
        if isinstance(measured, Outcome):
            return measured
        self.metrics = measured
        self.events.epoch(self._progress(state, took_s))
        packet = self._packet(state, took_s)
        state.loader.next_epoch()
        state.sums = EpochSums()
        self._keep(state)
        self._reread_config(state)
        self._epoch_began = self.monotonic()
        return self._consult(state, packet)

    # Measuring

    def _validate(self, state: TrainState) -> dict[str, float] | Outcome:
        metrics = {"train_loss": state.sums.loss / state.sums.steps} if state.sums.steps else {}
        if self.workload.validation is None:
            return metrics
        self.heart.validating = True
        try:
            found = evaluate(
                self.workload, self.workload.validation, device=self.device, between_batches=self.between_batches
            )
        finally:
            self.heart.validating = False
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

    def _packet(self, state: TrainState, took_s: float) -> SystemStatePacket:
        """Only what was measured; a field that is absent is unknown."""
        metrics = TrainingMetrics(
            optimizer_lr=state.update.learning_rate,
            epochs_total=self.workload.epochs,
            epoch_latency_ms=took_s * 1e3,
        )
        packet = SystemStatePacket(
            current_epoch=state.epoch + 1,
            global_step=state.step,
            timestamp_ns=time.time_ns(),
            source_subsystem="tolaria",
            experiment_name=f"{self.config.namespace}/{self.config.name}",
            hardware_context=HardwareContext(device_type=self.device.type, device_id=str(self.device.index or 0)),
        )
        if math.isfinite(state.loss):
            metrics.loss = state.loss
        for name, value in self.metrics.items():
            if name == "train_loss":
                packet.training_loss = value
            elif name == "validation_loss":
                packet.validation_loss = value
            elif name == "validation_accuracy":
                packet.validation_accuracy = value
                metrics.accuracy = value
        if state.sums.samples and took_s > 0:
            metrics.samples_per_s = state.sums.samples / took_s
        packet.metrics_struct.CopyFrom(metrics)
        return packet

    # Keeping

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

    # Listening

    def _consult(self, state: TrainState, packet: SystemStatePacket) -> Outcome | None:
        if self.handshake is None:
            return None
        result = self.handshake.exchange(packet)
        for change in result.degradations:
            self.events.degraded(change)
        for rejection in result.rejections:
            self.facts.record(Kind.REJECTED_COMMAND, reason=rejection)
            message = f"Kasmina refused a command of Tamiyo: {rejection}"
            self.events.notice(RunReason.COMMAND_REJECTED, message, warning=True)
        return None if result.command is None else self.commands.obey(result.command, state)

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
        self.checkpoints.configure(new.checkpoint)
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
