"""The optimizer and the gradients it eats: over a few flat pieces where that is exactly the same, else per tensor.

On the flat path the optimizer sees the pieces of flat.py in place of the model's parameters. A parameter that gets no
gradient in a step moves the update to the per-tensor path for good: torch's optimizers skip a parameter whose gradient
is None, but would decay one whose gradient is zero.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from esper_runtime.tolaria import values
from esper_runtime.tolaria.arena import Arena, Member, aligned_zeros, arenas_of
from esper_runtime.tolaria.flat import PIECE_ELEMENTS, SCALARS, Flat, small_first

ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop}
)
"""Exactly these classes; a subclass may do anything. tests/unit/runtime/tolaria proves equality bit for bit."""


class Path(StrEnum):
    FLAT = "flat"
    PER_TENSOR = "per-tensor"


class Update:
    """Owns the optimizer. A step is prepare, backward by the caller, collect, then perhaps apply."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._require_known()
        self.needs_closure = _needs_closure(optimizer)
        self._flats = tuple(
            Flat(arena, index, piece_elements=_piece_elements(arena, optimizer.param_groups[index]))
            for index, group in enumerate(self._groups)
            for arena in arenas_of(f"parameters.{index}", small_first(self._trainable(group), PIECE_ELEMENTS))
        )
        if not self._flats:
            raise ValueError("the optimizer has no parameter that requires a gradient: nothing would be trained")
        self.base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.why = why_per_tensor(model, optimizer) or "elementwise optimizer"
        self.path = Path.FLAT if self.why == "elementwise optimizer" else Path.PER_TENSOR
        self._factor = 1.0
        if self.path is Path.FLAT:
            self._flatten()

    def _require_known(self) -> None:
        for group in self._groups:
            for parameter in group:
                if id(parameter) not in self.names:
                    raise ValueError(
                        f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not in the model: "
                        "make it part of the model, else it could not be saved"
                    )

    def _trainable(self, group: list[Tensor]) -> list[tuple[str, Tensor]]:
        return [(self.names[id(parameter)], parameter) for parameter in group if parameter.requires_grad]

    @property
    def arenas(self) -> tuple[Arena, ...]:
        """The memory of the trained parameters."""
        return tuple(flat.arena for flat in self._flats)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Trained parameters by name."""
        for arena in self.arenas:
            yield from zip((member.name for member in arena.members), arena.tensors, strict=True)

    # One step

    def prepare(self) -> None:
        """Clears all gradients."""
        for flat in self._flats:
            flat.release_gradients()

    def collect(self) -> None:
        """Call after backward: takes the gradients up, and notices parameters that got none."""
        if self.path is Path.PER_TENSOR:
            return
        for flat in self._flats:
            for parameter in flat.arena.tensors:
                gradient = parameter.grad
                if gradient is None or gradient.is_sparse:
                    self._fall_back_in_step()
                    return
        for flat in self._flats:
            flat.take_gradients()

    def _fall_back_in_step(self) -> None:
        missing = [name for name, parameter in self.parameters() if parameter.grad is None]
        if not missing:
            self.fall_back("sparse gradients")
            return
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        self.fall_back(f"{missing[0]}{more} got no gradient in a step")

    def squared_norm(self) -> float:
        """Sum of squares of all gradients: finite unless one is not, or the sum overflows."""
        return sum([_squares(gradient.reshape(-1)) for gradient in self.gradients()])

    def all_finite(self) -> bool:
        """Exact, for when the sum of squares is not finite."""
        return all(bool(torch.isfinite(gradient).all()) for gradient in self.gradients())

    def scale_gradients(self, factor: float) -> None:
        for gradient in self.gradients():
            gradient.mul_(factor)

    def gradients(self) -> Iterator[Tensor]:
        """What the optimizer is going to use, between collect and prepare. Not to be kept."""
        if self.path is Path.FLAT:
            for flat in self._flats:
                yield from flat.gradients()
        else:
            yield from (_dense(p.grad) for arena in self.arenas for p in arena.tensors if p.grad is not None)

    def set_learning_rate(self, factor: float) -> None:
        """Multiplies every group's own rate by `factor`, from the next apply on."""
        if factor == self._factor:
            return
        self._factor = factor
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    @property
    def learning_rate(self) -> float:
        return self.base_rates[0] * self._factor

    def apply(self, closure: Callable[[], Tensor]) -> None:
        """Steps the optimizer. `closure` evaluates loss and gradients again, for optimizers that ask for it."""
        if self.needs_closure:
            step: Any = self.optimizer.step
            step(closure)
        else:
            self.optimizer.step()

    # Changing the path

    def _flatten(self) -> None:
        """Makes the optimizer see pieces. State it already has (Adagrad) becomes theirs."""
        for flat in self._flats:
            states = [self.optimizer.state.pop(parameter, {}) for parameter in flat.arena.tensors]
            if states[0]:
                flat.put_state(self.optimizer.state, _joined(flat.arena, states))
        for index, group in enumerate(self.optimizer.param_groups):
            group["params"] = [p.parameter for flat in self._flats if flat.group == index for p in flat.pieces]

    def fall_back(self, why: str) -> None:
        """Moves to the per-tensor path: parameters and moments stay where they are, as views of the same memory."""
        if self.path is Path.PER_TENSOR:
            return
        for flat in self._flats:
            state = flat.pop_state(self.optimizer.state)
            for parameter, part in zip(flat.arena.tensors, _split(flat.arena, state), strict=True):
                if part:
                    self.optimizer.state[parameter] = part
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = parameters
        self.path = Path.PER_TENSOR
        self.why = why

    # State

    def live_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(skeleton, tensors) of the optimizer's state as it lies in memory; not copied."""
        tensors: dict[str, Tensor] = {}
        skeleton = {
            name: {key: values.pack(f"optimizer.{name}.{key}", value, tensors) for key, value in state.items()}
            for name, state in self._live()
        }
        return skeleton, tensors

    def _live(self) -> Iterator[tuple[str, dict[str, Any]]]:
        states = self.optimizer.state
        if self.path is Path.FLAT:
            found = [(flat.arena.name, flat.state(states)) for flat in self._flats]
        else:
            found = [(name, states.get(parameter, {})) for name, parameter in self.parameters()]
        yield from ((name, state) for name, state in found if state)

    def put_live_state(self, path: Path, skeleton: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replaces the optimizer's state by what `live_state` gave on `path`; live tensors of equal shape are kept."""
        if path is Path.PER_TENSOR:
            self.fall_back("a restored state is per tensor")
        found = {name: {k: values.unpack(s, tensors) for k, s in state.items()} for name, state in skeleton.items()}
        if self.path is Path.FLAT:
            for flat in self._flats:
                flat.put_state(self.optimizer.state, found.get(flat.arena.name, {}))
            return
        if path is Path.FLAT:
            found = {
                member.name: part
                for arena in self.arenas
                for member, part in zip(arena.members, _split(arena, found.get(arena.name, {})), strict=True)
            }
        for name, parameter in self.parameters():
            _assign(self.optimizer.state, parameter, found.get(name))

    def portable_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(skeleton, tensors) by parameter name, whatever the path; tensors may be views of live memory."""
        tensors: dict[str, Tensor] = {}
        skeleton: dict[str, Any] = {}
        for name, state in self._per_parameter():
            skeleton[name] = {key: values.pack(f"{name}.{key}", value, tensors) for key, value in state.items()}
        return skeleton, tensors

    def _per_parameter(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for flat in self._flats:
            arena = flat.arena
            if self.path is Path.FLAT:
                states = _split(arena, flat.state(self.optimizer.state))
            else:
                states = [self.optimizer.state.get(parameter, {}) for parameter in arena.tensors]
            for member, state in zip(arena.members, states, strict=True):
                if state:
                    yield member.name, state

    def put_portable_state(self, skeleton: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replaces the optimizer's state by what `portable_state` gave; the path follows if it must."""
        states = {n: {k: values.unpack(s, tensors) for k, s in state.items()} for n, state in skeleton.items()}
        for arena in self.arenas:
            if self.path is Path.FLAT and not _joinable([states.get(m.name, {}) for m in arena.members]):
                self.fall_back("a restored state differs between parameters")
        for flat in self._flats:
            parts = [states.get(member.name, {}) for member in flat.arena.members]
            if self.path is Path.FLAT:
                flat.put_state(self.optimizer.state, _joined(flat.arena, parts))
                continue
            for parameter, part in zip(flat.arena.tensors, parts, strict=True):
                _assign(self.optimizer.state, parameter, part or None)


def _piece_elements(arena: Arena, group: Mapping[str, Any]) -> int:
    """Only where tensors are updated one after the other does a small piece stay in a cache."""
    one_by_one = arena.buffer.device.type == "cpu" and not group.get("foreach")
    return PIECE_ELEMENTS if one_by_one else max(arena.buffer.numel(), 1)


def why_per_tensor(model: nn.Module, optimizer: Optimizer) -> str | None:
    """None when the flat path gives the same bits."""
    if type(optimizer) not in ELEMENTWISE:
        return f"{type(optimizer).__name__} is not known to be elementwise"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has step hooks"
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return "the optimizer is differentiable"
        if group.get("eps") == 0:
            return "eps is 0"
        if group.get("fused"):
            return "a fused optimizer rounds the ends of tensors differently"
        if not all(parameter.is_floating_point() for parameter in group["params"]):
            return "complex parameters"
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in group["params"]):
            return "hooks on a parameter's gradient"
    if any(getattr(module, "sparse", False) for module in model.modules()):
        return "sparse gradients"
    return None


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _squares(flat: Tensor) -> float:
    wide = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    return torch.dot(wide, wide).item() if not wide.is_complex() else torch.vdot(wide, wide).real.item()


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _split(arena: Arena, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A flat state by parameter: moments as views, everything else copied."""

    def of(member: Member, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.clone() if key in SCALARS else member.view(value)

    return [{key: of(member, key, value) for key, value in state.items()} for member in arena.members]


def _joinable(parts: list[dict[str, Any]]) -> bool:
    """Whether all parameters have the same keys and the same scalars, so that one flat state says it all."""
    first = parts[0]
    return all(
        part.keys() == first.keys() and all(_agree(key, part[key], first[key]) for key in first) for part in parts[1:]
    )


def _agree(key: str, one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return key not in SCALARS or torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _joined(arena: Arena, parts: list[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for key, first in parts[0].items():
        if not isinstance(first, Tensor):
            joined[key] = first
        elif key in SCALARS:
            joined[key] = first.clone()
        else:
            joined[key] = aligned_zeros(arena.buffer.numel(), dtype=first.dtype, device=arena.buffer.device)
            for member, part in zip(arena.members, parts, strict=True):
                member.view(joined[key]).copy_(part[key])
    return joined


def _assign(state: Any, parameter: Tensor, found: dict[str, Any] | None) -> None:
    """Puts `found` in place of a parameter's state, into the tensors that are there already where they fit."""
    if not found:
        state.pop(parameter, None)
        return
    old = state.get(parameter, {})
    state[parameter] = {key: _in_place(old.get(key), value) for key, value in found.items()}


def _in_place(old: Any, new: Any) -> Any:
    if not isinstance(new, Tensor):
        return [_in_place(None, element) for element in new] if isinstance(new, list) else new
    if isinstance(old, Tensor) and old.shape == new.shape and old.dtype == new.dtype:
        return old if old is new else old.copy_(new)
    return new.clone(memory_format=torch.preserve_format)
