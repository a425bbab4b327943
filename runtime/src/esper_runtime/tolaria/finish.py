"""The end of training: the final checkpoint, the best epoch's model, its measured quality, the export."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from esper_leyline import paths
from esper_leyline.exitcodes import ExitCode
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import RunConfig
from esper_leyline.v1 import report_pb2 as pb

from esper_runtime.checkpoint import SaveError
from esper_runtime.tolaria.boundary import comparable
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.state import TrainState, export_tensors, parameter_count
from esper_runtime.tolaria.telemetry import Events, Heart, named
from esper_runtime.tolaria.validate import evaluate
from esper_runtime.workload import Goal, Workload, relation_of


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Runs once all epochs are done; may run again after a kill, with the same result."""

    workload: Workload
    config: RunConfig
    device: torch.device
    checkpoints: Checkpoints
    events: Events
    heart: Heart
    between_batches: Callable[[], Outcome | None]

    def complete(self, state: TrainState, metrics: dict[str, float]) -> Outcome:
        """`metrics` of the last epoch; empty when this process did not train it."""
        self.heart.validating = True  # no step is due any more, however long the volume takes
        saved = self.checkpoints.save_now(state, comparable(metrics))
        self.checkpoints.sealed = True  # from here on the model may hold the best epoch's weights
        best_step, epoch = self._take_best(state)
        final = self._evaluate(metrics)
        if isinstance(final, Outcome):
            return final
        meta = {
            "run": f"{self.config.namespace}/{self.config.name}",
            "runUID": self.config.uid,
            "entrypoint": self.config.entrypoint,
            "config": dict(self.config.config),
            "step": best_step,
            "epoch": epoch,
            "metrics": {name: value for name, value in final.items() if math.isfinite(value)},
            "parameters": parameter_count(state.model),
        }
        if not self._export(state, meta):
            message = "training is done, but the model could not be exported"
            return Outcome(
                exit_code=ExitCode.CHECKPOINT_DIR, reason=RunReason.CHECKPOINT_FAILED, message=message, saved_step=saved
            )
        self._announce(state, final, best_step)
        stated = ", ".join(f"{name} {value:.4f}" for name, value in final.items())
        return Outcome(
            exit_code=ExitCode.COMPLETE,
            reason=RunReason.COMPLETE,
            message=f"{_which(best_step, state.step)}: {stated}",
            saved_step=saved,
        )

    def _take_best(self, state: TrainState) -> tuple[int, int]:
        """(step, epoch) of the model that is exported: the best checkpoint, or the last state without one."""
        best = self.checkpoints.load_best()[1] if self.config.checkpoint.retention.keep_best else None
        if best is None:
            return state.step, state.epoch
        state.restore_model(best.tensors["model"])
        return best.step, best.epoch

    def _evaluate(self, metrics: dict[str, float]) -> dict[str, float] | Outcome:
        if self.workload.validation is None:
            return metrics
        found = evaluate(
            self.workload, self.workload.validation, device=self.device, between_batches=self.between_batches
        )
        if isinstance(found, Outcome):
            return found
        return {f"validation_{name}": value for name, value in found.items()}

    def _export(self, state: TrainState, meta: dict[str, Any]) -> bool:
        try:
            self.checkpoints.export(export_tensors(state.model), meta)
        except SaveError as error:
            self.events.degradation("checkpoint", degraded=True, reason=RunReason.CHECKPOINT_FAILED, message=f"{error}")
            return False
        return True

    def _announce(self, state: TrainState, final: dict[str, float], best_step: int) -> None:
        for missed in goals_missed(self.workload.goals, comparable(final)):
            self.events.notice(RunReason.COMPLETE, missed, warning=True)
        completion = pb.Completion(
            export_path=f"{self.config.uid}/{paths.EXPORT_DIR}", best_step=best_step, metrics=named(final)
        )
        self.events.completion(completion)
        message = ", ".join(f"{name} {value:.4f}" for name, value in final.items())
        self.events.transition(pb.RUNTIME_PHASE_SUCCEEDED, reason=RunReason.COMPLETE, message=message, step=state.step)


def _which(exported: int, last: int) -> str:
    """The step whose model is exported, with its reason where it is not the last."""
    return f"step {last}" if exported == last else f"trained to step {last}, the best model is of step {exported}"


def goals_missed(goals: Mapping[str, Goal], reached: Mapping[str, float]) -> Iterator[str]:
    """What to say of each goal that the finished model does not reach, or that nobody measured."""
    for name, goal in goals.items():
        relation, wanted = relation_of(name, goal)
        value = reached.get(name)
        if value is None:
            yield f"goal missed: {name} is not measured, wanted {relation} {wanted:g}"
        elif not (value >= wanted if relation == ">=" else value <= wanted):
            yield f"goal missed: {name} is {value:.4f}, wanted {relation} {wanted:g}"
