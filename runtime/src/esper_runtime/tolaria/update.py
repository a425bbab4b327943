"""The optimizer and the gradients it eats: over a few flat pieces where that is exactly the same, else per tensor.

On the flat path the optimizer sees the pieces of flat.py in place of the model's parameters. A parameter that gets no
gradient in a step moves the update to the per-tensor path for good: torch's optimizers skip a parameter whose gradient
is None, but would decay one whose gradient is zero.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from esper_runtime.tolaria import values
from esper_runtime.tolaria.arena import Arena, arenas_of
from esper_runtime.tolaria.flat import (
    PIECE_ELEMENTS,
    Flat,
    joinable,
    joined_state,
    small_first,
    split_state,
    squares_of,
)
from esper_runtime.tolaria.groups import Group, Options, register, require_new, split, unsplit
from esper_runtime.tolaria.optimizers import (
    ELEMENTWISE,
    Carried,
    Factory,
    OptimizerRebuildError,
    carry,
    describe,
    groups_of,
    initial_state,
    make,
    recreate,
)
from esper_runtime.workload import Workload

_REBUILT, _STATES = "rebuilt", "states"
"""Of a saved state: the optimizer's description when it is not the workload's own, and its state by name."""


class Path(StrEnum):
    FLAT = "flat"
    PER_TENSOR = "per-tensor"


class Update:
    """Owns the optimizer. A step is prepare, backward by the caller, collect, then perhaps apply."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, options: Sequence[Options] | None = None) -> None:
        """`options` of the optimizer's groups, in their order; without them every rate is constant."""
        self._model = model
        self.optimizer = optimizer
        self.groups = register(optimizer, unsplit(optimizer, None) if options is None else options)
        self._members = [list(group["params"]) for group in optimizer.param_groups]
        self._own_class = type(optimizer)
        self._own_description = describe(optimizer)
        self._rebuilt: dict[str, Any] | None = None
        """Describes an optimizer that is not the one the workload made."""
        self.changes = 0
        """How often groups or optimizer were exchanged."""
        self._bind()

    def _bind(self) -> None:
        """Chooses arenas and path. The optimizer has the model's own parameters, and perhaps state of each."""
        self.names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        self._require_known()
        flats = tuple(
            Flat(arena, index, piece_elements=_piece_elements(arena, self.optimizer.param_groups[index]))
            for index, members in enumerate(self._members)
            for arena in arenas_of(f"parameters.{index}", small_first(self._trainable(members), PIECE_ELEMENTS))
        )
        if not flats:
            raise ValueError("the optimizer has no parameter that requires a gradient: nothing would be trained")
        self._flats = flats
        self._choose()

    def _choose(self) -> None:
        self.changes += 1
        self.needs_closure = _needs_closure(self.optimizer)
        self._step = bare_step(self.optimizer)
        states = self.optimizer.state
        why = why_per_tensor(self._model, self.optimizer)
        if why is None and not all(joinable([states.get(p, {}) for p in f.arena.tensors]) for f in self._flats):
            why = "state differs between parameters"
        self.path = Path.FLAT if why is None else Path.PER_TENSOR
        self.why = why or "elementwise optimizer"
        if self.path is Path.FLAT:
            self._flatten()
        else:
            for flat in self._flats:
                flat.pop_state({})  # of an optimizer that is no more

    def _require_known(self) -> None:
        for group in self._members:
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
            if not flat.take_gradients():
                self._fall_back_in_step()
                return

    def _fall_back_in_step(self) -> None:
        missing = [name for name, parameter in self.parameters() if parameter.grad is None]
        if not missing:
            self.fall_back("sparse gradients")
            return
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        self.fall_back(f"{missing[0]}{more} got no gradient in a step")

    def squared_norm(self) -> float:
        """Sum of squares of all gradients: finite unless one is not, or the sum overflows."""
        return squares_of(list(self.gradients()))

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

    @property
    def learning_rate(self) -> float:
        """Of the first group."""
        return self.groups[0].written

    def apply(self, closure: Callable[[], Tensor]) -> None:
        """Steps the optimizer. `closure` evaluates loss and gradients again, for optimizers that ask for it."""
        if self.needs_closure:
            step: Any = self.optimizer.step
            step(closure)
        else:
            self._step()

    # Changing the path

    def _flatten(self) -> None:
        """Makes the optimizer see pieces. State it already has (Adagrad) becomes theirs."""
        for flat in self._flats:
            states = [self.optimizer.state.pop(parameter, {}) for parameter in flat.arena.tensors]
            if states[0]:
                flat.put_state(self.optimizer.state, joined_state(flat.arena, states))
        for index, group in enumerate(self.optimizer.param_groups):
            group["params"] = [p.parameter for flat in self._flats if flat.group == index for p in flat.pieces]

    def fall_back(self, why: str) -> None:
        """Moves to the per-tensor path: parameters and moments stay where they are, as views of the same memory."""
        if self.path is Path.PER_TENSOR:
            return
        for flat in self._flats:
            state = flat.pop_state(self.optimizer.state)
            for parameter, part in zip(flat.arena.tensors, split_state(flat.arena, state), strict=True):
                if part:
                    self.optimizer.state[parameter] = part
        for group, parameters in zip(self.optimizer.param_groups, self._members, strict=True):
            group["params"] = list(parameters)
        self.path = Path.PER_TENSOR
        self.why = why

    # Changing the set of parameters, or the optimizer. Only at a boundary: gradients are lost

    @contextmanager
    def _taken_apart(self) -> Iterator[None]:
        """Inside, the optimizer has the model's own parameters; afterwards arenas and path are chosen anew."""
        self.prepare()
        self.fall_back("parameters change")
        try:
            yield
        finally:
            self._bind()

    def add_parameters(self, parameters: Sequence[nn.Parameter], group: Group, **options: Any) -> None:
        """One more group, registered as `group`; `options` of torch that it has apart from the optimizer's defaults.

        ValueError, and nothing has changed, for parameters that are not in the model or are trained already.
        """
        require_new(group.name, self.groups)
        inside = {id(parameter) for parameter in self._model.parameters()}
        trained = {id(parameter) for members in self._members for parameter in members}
        added = [id(parameter) for parameter in parameters]
        if not added or len(set(added)) < len(added) or not inside.issuperset(added) or trained & set(added):
            raise ValueError(
                f"parameter group {group.name!r}: give parameters of the model, each once, that are in no group yet"
            )
        first = self.optimizer.param_groups[0]["lr"]
        rate = torch.full_like(first, group.written) if isinstance(first, Tensor) else group.written
        with self._taken_apart():
            self.optimizer.add_param_group({**options, "params": list(parameters), "lr": rate})
            live = self.optimizer.param_groups[-1]
            self.optimizer.state.update(initial_state(self.optimizer, live))
            group.hold(rate)
            self.groups.append(group)
            self._members.append(list(parameters))
        self._redescribe()

    def remove_parameters(self, names: Collection[str]) -> None:
        """Takes parameters out, with their state; a group that has none left goes too. They keep their values.

        ValueError, and nothing has changed, for a name that is not trained, and when nothing would be left.
        """
        held = {self.names[id(parameter)]: parameter for members in self._members for parameter in members}
        unknown = [name for name in names if name not in held]
        gone = {id(held[name]) for name in names if name in held}
        left = [p for members in self._members for p in members if id(p) not in gone and p.requires_grad]
        if unknown or not left:
            raise ValueError(f"{unknown[0]} is in no group" if unknown else "no parameter would be left to train")
        with self._taken_apart():
            for index in reversed(range(len(self._members))):
                for parameter in [p for p in self._members[index] if id(p) in gone]:
                    self.optimizer.state.pop(parameter, None)
                    parameter.grad = None
                    parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
                kept = [p for p in self._members[index] if id(p) not in gone]
                self._members[index] = kept
                self.optimizer.param_groups[index]["params"] = list(kept)
                if not kept:
                    del self._members[index], self.groups[index], self.optimizer.param_groups[index]
        self._redescribe()

    def _redescribe(self) -> None:
        if self._rebuilt is not None:
            self._rebuilt = describe(self.optimizer)

    def rebuild(self, factory: Factory) -> Carried:
        """Puts what `factory` makes of the groups in the optimizer's place, with the state that they have in common.

        Parameters are found by name, so that a tensor that the model has replaced is taken up; state follows the
        tensors whose shape is the same. OptimizerRebuildError, and nothing has changed, when that is not possible.
        """
        now: dict[str, Tensor] = dict(self._model.named_parameters())
        try:
            members = [[now[self.names[id(old)]] for old in group] for group in self._members]
        except KeyError as error:
            raise OptimizerRebuildError(f"the model has no parameter {error} any more: remove it first") from error
        new = make(factory, groups_of(members, self.optimizer.param_groups))
        if type(new) not in {*ELEMENTWISE, self._own_class}:
            raise OptimizerRebuildError(f"a {type(new).__name__} could not be made again after a restart")
        shapes = {name: parameter.shape for name, parameter in self.parameters()}
        states = {now[name]: state for name, state in self._per_parameter() if now[name].shape == shapes[name]}
        carried = carry(type(self.optimizer), states, new, factory)
        self._replace(new, members)
        self._rebuilt = describe(new)
        return carried

    def _replace(self, new: Optimizer, members: list[list[Tensor]]) -> None:
        same = all(
            a is b
            for mine, theirs in zip(self._members, members, strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )
        self.prepare()
        self.optimizer, self._members = new, members
        for registered, group in zip(self.groups, new.param_groups, strict=True):
            registered.hold(group["lr"])
        if same:
            self._choose()
        else:
            self._bind()

    def _become(self, rebuilt: Mapping[str, Any] | None) -> None:
        """Before a state is put in place that is of another optimizer than the present one: makes that, empty."""
        if rebuilt == self._rebuilt:
            return
        description = self._own_description if rebuilt is None else rebuilt
        if description is None:
            raise OptimizerRebuildError("the state is of the workload's own optimizer, which cannot be made again")
        groups = groups_of(self._members, self.optimizer.param_groups)
        self._replace(recreate(description, groups, known=self._own_class), self._members)
        self._rebuilt = None if rebuilt is None else dict(rebuilt)

    # State

    def live_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(skeleton, tensors) of the optimizer's state as it lies in memory; not copied."""
        tensors: dict[str, Tensor] = {}
        states = {
            name: {key: values.pack(f"optimizer.{name}.{key}", value, tensors) for key, value in state.items()}
            for name, state in self._live()
        }
        return {_REBUILT: self._rebuilt, _STATES: states}, tensors

    def _live(self) -> Iterator[tuple[str, dict[str, Any]]]:
        states = self.optimizer.state
        if self.path is Path.FLAT:
            found = [(flat.arena.name, flat.state(states)) for flat in self._flats]
        else:
            found = [(name, states.get(parameter, {})) for name, parameter in self.parameters()]
        yield from ((name, state) for name, state in found if state)

    def put_live_state(self, path: Path, skeleton: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replaces the optimizer's state by what `live_state` gave on `path`; live tensors of equal shape are kept."""
        self._become(skeleton[_REBUILT])
        if path is Path.PER_TENSOR:
            self.fall_back("a restored state is per tensor")
        found = {n: {k: values.unpack(s, tensors) for k, s in state.items()} for n, state in skeleton[_STATES].items()}
        if self.path is Path.FLAT:
            for flat in self._flats:
                flat.put_state(self.optimizer.state, found.get(flat.arena.name, {}))
            return
        if path is Path.FLAT:
            found = {
                member.name: part
                for arena in self.arenas
                for member, part in zip(arena.members, split_state(arena, found.get(arena.name, {})), strict=True)
            }
        for name, parameter in self.parameters():
            _assign(self.optimizer.state, parameter, found.get(name))

    def portable_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(skeleton, tensors) by parameter name, whatever the path; tensors may be views of live memory."""
        tensors: dict[str, Tensor] = {}
        states: dict[str, Any] = {}
        for name, state in self._per_parameter():
            states[name] = {key: values.pack(f"{name}.{key}", value, tensors) for key, value in state.items()}
        return {_REBUILT: self._rebuilt, _STATES: states}, tensors

    def _per_parameter(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for flat in self._flats:
            arena = flat.arena
            if self.path is Path.FLAT:
                states = split_state(arena, flat.state(self.optimizer.state))
            else:
                states = [self.optimizer.state.get(parameter, {}) for parameter in arena.tensors]
            for member, state in zip(arena.members, states, strict=True):
                if state:
                    yield member.name, state

    def put_portable_state(self, skeleton: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replaces the optimizer's state by what `portable_state` gave; the path follows if it must."""
        if _STATES not in skeleton:  # version 1
            skeleton = {_REBUILT: None, _STATES: skeleton}
        self._become(skeleton[_REBUILT])
        states = {n: {k: values.unpack(s, tensors) for k, s in state.items()} for n, state in skeleton[_STATES].items()}
        for arena in self.arenas:
            if self.path is Path.FLAT and not joinable([states.get(m.name, {}) for m in arena.members]):
                self.fall_back("a restored state differs between parameters")
        for flat in self._flats:
            parts = [states.get(member.name, {}) for member in flat.arena.members]
            if self.path is Path.FLAT:
                flat.put_state(self.optimizer.state, joined_state(flat.arena, parts))
                continue
            for parameter, part in zip(flat.arena.tensors, parts, strict=True):
                _assign(self.optimizer.state, parameter, part or None)


def update_of(workload: Workload, model: nn.Module) -> Update:
    """The workload's own optimizer of `model`, its groups registered. TypeError or ValueError when it is none."""
    if workload.parameter_groups is None:
        optimizer, options = workload.optimizer(model.parameters()), None
    else:
        groups, options = split(workload.parameter_groups(model), workload.schedule)
        optimizer = workload.optimizer(groups)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Workload.optimizer returned {type(optimizer).__name__}; it must return a torch optimizer")
    return Update(model, optimizer, unsplit(optimizer, workload.schedule) if options is None else options)


def bare_step(optimizer: Optimizer) -> Callable[[], Any]:
    """The optimizer's step without torch's wrapper for hooks and profiler ranges, where there are no hooks to call.

    The wrapper costs as much as the update of a small model.
    """
    hooks = (
        *(optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks),
        *(_global_optimizer_pre_hooks, _global_optimizer_post_hooks),
    )
    wrapped = getattr(type(optimizer).step, "__wrapped__", None)
    if wrapped is None or "step" in vars(optimizer) or any(hooks):
        return optimizer.step
    return partial(wrapped, optimizer)


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


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


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
