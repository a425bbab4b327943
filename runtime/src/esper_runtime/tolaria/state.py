"""Everything that a resumed run needs to continue bit for bit, and its three forms.

`live` gives the memory itself, for snapshots; `generation` a copy by name, for the checkpoint volume; both are put
back into the very tensors that training uses, never by replacing them. Counters, fired faults, the learning-rate scale
and skipped batches are no part of it: they are facts of the run, kept in its log, and no rollback undoes them.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from esper_leyline import pages
from torch import Tensor, nn

from esper_runtime.checkpoint import GenerationData, LoadedGeneration
from esper_runtime.tolaria import rng, soundness
from esper_runtime.tolaria.arena import Arena, arenas_of
from esper_runtime.tolaria.data import AnyLoader, Position
from esper_runtime.tolaria.judge import Judge
from esper_runtime.tolaria.update import Path, Update

_JUDGE = "judge"
_RNG = "rng."


Release = Callable[[], None]
"""Gives the memory of a copy back."""
Copy = Callable[[Mapping[str, Mapping[str, Tensor]]], tuple[Mapping[str, Mapping[str, Tensor]], Release]]
"""Copies tensors, by file stem and name, to the CPU."""


class StateMismatchError(ValueError):
    """A saved state does not fit this model; the message names the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best epoch by the retention metric."""

    value: float
    step: int
    epoch: int


@dataclass(kw_only=True, slots=True)
class EpochSums:
    """Of the epoch that runs."""

    loss: float = 0.0
    steps: int = 0
    samples: int = 0


class RunClock:
    """Seconds this run has trained, over all its processes: monotonic, never a wall clock."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._base = 0.0
        self._started = monotonic()

    def seconds(self) -> float:
        return self._base + self._monotonic() - self._started

    def at_least(self, seconds: float) -> None:
        """Continues an earlier process's clock; never moves back."""
        self._base += max(0.0, seconds - self.seconds())


class Extra(Protocol):
    """A part with a small state of its own that snapshots, checkpoints and rollbacks carry along."""

    def capture(self) -> dict[str, Any]:
        """What JSON can carry; no NaN, no infinity."""

    def restore(self, saved: Mapping[str, Any]) -> None:
        """What `capture` gave, perhaps in another process; {} from a state that was saved without this part."""


@dataclass(kw_only=True)
class TrainState:
    """The state of one trainer. `step` counts applied and discarded steps; `loader.position` is the next batch."""

    model: nn.Module
    update: Update
    loader: AnyLoader
    judge: Judge
    clock: RunClock = field(default_factory=RunClock)
    run_uid: str = ""
    step: int = 0
    loss: float = float("nan")
    learning_rate_scale: float = 1.0
    best: Best | None = None
    sums: EpochSums = field(default_factory=EpochSums)
    extras: dict[str, Extra] = field(default_factory=dict)
    """By name: learning_rate, scaler, loader, stability."""

    def __post_init__(self) -> None:
        self._buffers = self._bind_buffers()
        self.never_finite = frozenset(soundness.culprits(self._buffers))
        """Buffers that the workload made with infinities (masks): meant so. Asked before anything is restored."""

    @property
    def epoch(self) -> int:
        return self.loader.position.epoch

    def total_steps(self, epochs: int) -> int:
        """Steps that a training of so many epochs will have made when it is done: a skipped batch is no step.

        0 while nobody knows how long an epoch is.
        """
        return self.step + self.loader.remaining(epochs) if self.loader.batches_per_epoch else 0

    @property
    def layout(self) -> str:
        """Identifies the shape of the model and what of it is trained: a state fits only where this is equal."""
        arenas = (*self.update.arenas, *self._buffers)
        return ";".join(
            f"{arena.name}:{m.name}:{m.shape}:{m.stride}:{arena.buffer.dtype}"
            for arena in arenas
            for m in arena.members
        )

    # Buffers

    def _bind_buffers(self) -> tuple[Arena, ...]:
        trained = {id(parameter) for _, parameter in self.update.parameters()}
        frozen = [(name, p) for name, p in self.model.named_parameters() if id(p) not in trained]
        self._watched = [(module._buffers, dict(module._buffers)) for module in self.model.modules()]
        return arenas_of("buffers", [*frozen, *self.model.named_buffers()])

    def parameters_changed(self) -> None:
        """The set of trained parameters is another one: what is not trained goes with the buffers."""
        self._buffers = self._bind_buffers()

    def rebind(self) -> None:
        """Takes up buffers that user code has replaced, added or removed instead of changed."""
        if self._replaced() or not all(arena.is_bound() for arena in self._buffers):
            self._buffers = self._bind_buffers()

    def _replaced(self) -> bool:
        """Of every module; most have no buffer, so that a loop is quicker than what is shorter."""
        for now, then in self._watched:
            if len(now) != len(then):
                return True
            for name, buffer in then.items():
                if now.get(name) is not buffer:
                    return True
        return False

    @property
    def buffer_arenas(self) -> tuple[Arena, ...]:
        """The memory of buffers and frozen parameters."""
        return self._buffers

    # Memory form

    def live(self) -> tuple[dict[str, Tensor], dict[str, bytes], dict[str, Any]]:
        """(tensors as they lie in memory, blobs, JSON)."""
        self.rebind()
        skeleton, moments = self.update.live_state()
        blobs = {f"{_RNG}{name}": state for name, state in rng.capture().items()}
        blobs[_JUDGE] = self.judge.capture()
        meta = {**self._facts(), "path": self.update.path, "optimizer": skeleton}
        return {**self._arena_tensors(), **moments}, blobs, meta

    def culprits(self, tensors: Iterable[str]) -> list[str]:
        """What is not finite in these tensors of `live`, by the model's own names."""
        arenas = {arena.name: arena for arena in (*self.update.arenas, *self._buffers)}
        moments = self.update.live_state()[1]
        found: list[str] = []
        for name in tensors:
            if name in arenas:
                found += soundness.culprits([arenas[name]])
                continue
            of = next((arena for arena in arenas.values() if name.startswith(f"optimizer.{arena.name}.")), None)
            moment = moments[name]
            if of is None or moment.numel() != of.buffer.numel():
                found.append(name.removeprefix("optimizer."))
            else:
                kind = name.rpartition(".")[2]
                found += [f"{kind} of {member}" for member in soundness.culprits([of], moment)]
        return found

    def restore_targets(self) -> dict[str, Tensor]:
        """Live tensors by the names that `live` uses."""
        self.rebind()
        return {**self._arena_tensors(), **self.update.live_state()[1]}

    def restore_live(self, tensors: Mapping[str, Tensor], blobs: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
        """Arena tensors are already in place; takes up the rest."""
        self.update.put_live_state(Path(meta["path"]), meta["optimizer"], tensors)
        self.judge.restore(blobs[_JUDGE])
        rng.restore({name.removeprefix(_RNG): state for name, state in blobs.items() if name.startswith(_RNG)})
        self._take_facts(meta)

    def _arena_tensors(self) -> dict[str, Tensor]:
        arenas = (*self.update.arenas, *self._buffers)
        return {arena.name: arena.buffer for arena in arenas}

    # Durable form

    def generation(self, metrics: Mapping[str, float], *, copy: Copy | None = None) -> GenerationData:
        """A copy on the CPU, by the model's own names; made by `copy`, else in fresh memory."""
        self.rebind()
        skeleton, moments = self.update.portable_state()
        aux = {f"{_RNG}{name}": _tensor(state) for name, state in rng.capture().items()}
        aux[_JUDGE] = _tensor(self.judge.capture())
        copied, release = (copy or _fresh)({"model": self._model_tensors(), "optimizer": moments, "aux": aux})
        checked = self._meant_finite(copied)
        return GenerationData(
            epoch=self.epoch,
            step=self.step,
            tensors=copied,
            suspect=self.judge.suspicious,
            sound=lambda: soundness.all_finite(checked),
            release=release,
            state={**self._facts(), "path": self.update.path, "optimizer": skeleton, "run": self.run_uid},
            metrics=metrics,
        )

    def _meant_finite(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> list[Tensor]:
        model = [tensor for name, tensor in tensors["model"].items() if name not in self.never_finite]
        return [*model, *tensors.get("optimizer", {}).values()]

    def is_sound(self, loaded: LoadedGeneration) -> bool:
        """Whether all of it is finite that is meant to be."""
        return soundness.all_finite(self._meant_finite(loaded.tensors))

    def restore_generation(self, loaded: LoadedGeneration) -> None:
        """StateMismatchError, before anything is touched, when it does not fit the model."""
        self._put_model(loaded.tensors["model"])
        state = loaded.state
        if Path(state["path"]) is Path.PER_TENSOR:
            self.update.fall_back("the checkpoint was per tensor")
        self.update.put_portable_state(state["optimizer"], loaded.tensors.get("optimizer", {}))
        aux = {name: tensor.numpy().tobytes() for name, tensor in loaded.tensors["aux"].items()}
        self.judge.restore(aux[_JUDGE])
        rng.restore({name.removeprefix(_RNG): raw for name, raw in aux.items() if name.startswith(_RNG)})
        self._take_facts(state)
        if state["run"] != self.run_uid:
            self.best = None  # of another run, whose checkpoints are not ours to keep

    @torch.no_grad()
    def _put_model(self, saved: Mapping[str, Tensor]) -> None:
        live = self._model_tensors()
        for name, tensor in live.items():
            if name not in saved or saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
                had = f"{saved[name].dtype} {tuple(saved[name].shape)}" if name in saved else "nothing"
                raise StateMismatchError(
                    f"the checkpoint does not fit the model: {name} is {tensor.dtype} {tuple(tensor.shape)}, the "
                    f"checkpoint has {had}; use the model it was made with, or another run"
                )
        for name, tensor in live.items():
            tensor.copy_(saved[name])

    def restore_model(self, saved: Mapping[str, Tensor]) -> None:
        """Parameters and buffers alone, such as those of the best epoch."""
        self._put_model(saved)

    def _model_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    # Facts

    def _facts(self) -> dict[str, Any]:
        best = self.best
        return {
            "step": self.step,
            "position": list(self.loader.position),
            "loss": pages.float_bits(self.loss),
            "best": None if best is None else [best.value, best.step, best.epoch],
            "sums": [self.sums.loss, self.sums.steps, self.sums.samples],
            "seconds": self.clock.seconds(),
            "extras": {name: extra.capture() for name, extra in self.extras.items()},
        }

    def _take_facts(self, facts: Mapping[str, Any]) -> None:
        self.step = facts["step"]
        self.loader.position = Position(*facts["position"])
        self.loss = pages.bits_float(facts["loss"])
        best = facts["best"]
        self.best = None if best is None else Best(value=best[0], step=best[1], epoch=best[2])
        loss, steps, samples = facts["sums"]
        self.sums = EpochSums(loss=loss, steps=steps, samples=samples)
        self.clock.at_least(facts["seconds"])
        saved = facts.get("extras", {})
        for name, extra in self.extras.items():
            extra.restore(saved.get(name, {}))


def export_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict as copies on the CPU, for `load_state_dict` elsewhere."""
    return _copies({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _fresh(tensors: Mapping[str, Mapping[str, Tensor]]) -> tuple[Mapping[str, Mapping[str, Tensor]], Release]:
    return {stem: _copies(part) for stem, part in tensors.items()}, lambda: None


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
