"""Making one optimizer in place of another: which class, which options, and how much of its state can be kept.

Nothing here changes the old optimizer. State is kept by the identity of its parameter, and only where the same key
means the same number: within one class, and between Adam and AdamW. A momentum of SGD is no momentum of RMSprop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from esper_runtime.tolaria.flat import SCALARS, own

ELEMENTWISE: Final[frozenset[type[Optimizer]]] = frozenset(
    {SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop}
)
"""Exactly these classes; a subclass may do anything. tests/unit/runtime/tolaria proves equality bit for bit."""
KINDS: Final[dict[str, type[Optimizer]]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "rmsprop": RMSprop}
"""What a command may ask for, by optimizer_id."""
MOMENTUM = 0.9
"""Of an SGD that takes the place of another class."""
_SHARED = ("weight_decay", "maximize", "foreach")
"""Options that mean the same to all of KINDS."""
_FAMILY = {Adam: "adam", AdamW: "adam"}

Groups = list[dict[str, Any]]
"""Of an optimizer in the making: params and lr, perhaps more."""
Factory = Callable[[Groups], Optimizer]
State = Mapping[str, Any]


class OptimizerRebuildError(ValueError):
    """The new optimizer cannot take the old one's place, which it therefore keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """How many values of the old state (one per parameter and key) there were, and went over."""

    total: int
    preserved: int

    @property
    def ratio(self) -> float:
        """1 when there was nothing to lose."""
        return self.preserved / self.total if self.total else 1.0


def factory_for(optimizer_id: str, old: Optimizer) -> Factory:
    """Makes one of KINDS, with the options that it shares with `old`, group by group.

    OptimizerRebuildError for another id.
    """
    kind = KINDS.get(optimizer_id)
    if kind is None:
        raise OptimizerRebuildError(f"optimizer_id is {optimizer_id[:64]!r}; give one of {', '.join(KINDS)}")
    family = _family(kind) == _family(type(old))
    options: list[dict[str, Any]] = []
    for group in old.param_groups:
        kept = _options(group) if family else {key: group[key] for key in _SHARED if key in group}
        kept.pop("decoupled_weight_decay", None)  # Adam's and AdamW's own business
        options.append(kept if family or kind is not SGD else {"momentum": MOMENTUM, **kept})
    make_kind: Any = kind
    return lambda groups: make_kind([{**chosen, **group} for chosen, group in zip(options, groups, strict=True)])


def describe(optimizer: Optimizer) -> dict[str, Any] | None:
    """Class and options as JSON, from which `recreate` makes its like; None when they are no JSON."""
    groups = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in _options(group).items()}
        for group in optimizer.param_groups
    ]
    plain = all(_is_plain(value) for group in groups for value in group.values())
    return {"class": type(optimizer).__name__, "groups": groups} if plain else None


def recreate(description: Mapping[str, Any], groups: Groups, *, known: type[Optimizer]) -> Optimizer:
    """An optimizer without state. `known` is the workload's own class."""
    classes = {kind.__name__: kind for kind in (*ELEMENTWISE, known)}
    kind = classes.get(description["class"])
    options = description["groups"]
    if kind is None or len(options) != len(groups):
        raise OptimizerRebuildError(
            f"the state is of an optimizer {description['class']!r} with {len(options)} groups, the workload's has "
            f"{len(groups)}: use the workload it was made with"
        )
    made: Any = kind
    new: Optimizer = made([{**_tuples(chosen), **group} for chosen, group in zip(options, groups, strict=True)])
    return new


def make(factory: Factory, groups: Groups) -> Optimizer:
    """What `factory` makes of the groups, if it is an optimizer of exactly these. OptimizerRebuildError otherwise."""
    try:
        new = factory([dict(group) for group in groups])
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise OptimizerRebuildError(f"it could not be made: {type(error).__name__}: {error}") from error
    if not isinstance(new, Optimizer):
        raise OptimizerRebuildError(f"it is a {type(new).__name__}, not a torch optimizer")
    same = len(new.param_groups) == len(groups) and all(
        [id(p) for p in made["params"]] == [id(p) for p in asked["params"]]
        for made, asked in zip(new.param_groups, groups, strict=True)
    )
    if not same:
        raise OptimizerRebuildError("it does not have the same parameters in the same groups")
    for made, asked in zip(new.param_groups, groups, strict=True):
        if float(made["lr"]) != float(asked["lr"]):
            raise OptimizerRebuildError("it changes a learning rate: take the groups' lr as they are")
    return new


def carry(old: type[Optimizer], states: Mapping[Tensor, State], new: Optimizer, factory: Factory) -> Carried:
    """Copies `states`, those of an `old`, into `new` and verifies them. OptimizerRebuildError when one does not fit."""
    total = sum(len(state) for state in states.values())
    if _family(old) != _family(type(new)):
        return Carried(total=total, preserved=0)
    expected = preserved = 0
    for group in new.param_groups:
        known = [parameter for parameter in group["params"] if states.get(parameter)]
        if not known:
            continue
        fresh = _fresh(factory, new, group) if type(new) in ELEMENTWISE else None
        for parameter in known:
            state = states[parameter]
            keys = state.keys() if fresh is None else state.keys() & fresh.keys()
            if not keys:
                continue
            _require_fit(parameter, state, elementwise=fresh is not None)
            missing = {} if fresh is None else {key: fresh[key] for key in fresh.keys() - keys}
            filled = {key: _spread(key, value, parameter) for key, value in missing.items()}
            new.state[parameter] = {**{key: own(state[key]) for key in state if key in keys}, **filled}
            expected += len(keys)
            preserved += sum(_same(new.state[parameter].get(key), state[key]) for key in keys)
    if preserved != expected:
        raise OptimizerRebuildError(f"{preserved} of {expected} values of its state were kept")
    return Carried(total=total, preserved=preserved)


def initial_state(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """What Adagrad gives its parameters when it is made, and forgets to give to those that are added later."""
    if type(optimizer) is not Adagrad:
        return {}
    return dict(Adagrad([dict(group)], initial_accumulator_value=group["initial_accumulator_value"]).state)


def _fresh(factory: Factory, new: Optimizer, group: Mapping[str, Any]) -> State:
    """State of a single number in this group's place, one step after it was made, with a gradient of zero."""
    dummies = [nn.Parameter(torch.zeros(1, dtype=p.dtype, device=p.device)) for p in _firsts(new)]
    probe = factory([{"params": [d], "lr": g["lr"]} for d, g in zip(dummies, new.param_groups, strict=True)])
    for dummy in dummies:
        dummy.grad = torch.zeros_like(dummy)
    step: Any = probe.step
    step()
    index = next(index for index, candidate in enumerate(new.param_groups) if candidate is group)
    return dict(probe.state[dummies[index]])


def _firsts(optimizer: Optimizer) -> list[Tensor]:
    return [group["params"][0] for group in optimizer.param_groups]


def _spread(key: str, value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor) and key not in SCALARS:
        return torch.full_like(parameter, value.item(), dtype=value.dtype, memory_format=torch.preserve_format)
    return own(value)


def _require_fit(parameter: Tensor, state: State, *, elementwise: bool) -> None:
    for key, value in state.items():
        if elementwise and isinstance(value, Tensor) and key not in SCALARS and value.shape != parameter.shape:
            had, wanted = tuple(value.shape), tuple(parameter.shape)
            raise OptimizerRebuildError(f"state {key} of shape {had} does not fit its parameter of shape {wanted}")


def _same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _family(kind: type[Optimizer]) -> object:
    return _FAMILY.get(kind, kind)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "lr", "param_names")}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def groups_of(parameters: Sequence[Sequence[Tensor]], live: Sequence[Mapping[str, Any]]) -> Groups:
    """What a factory is given: parameters by group, and the rates that are in force."""
    return [{"params": list(group), "lr": now["lr"]} for group, now in zip(parameters, live, strict=True)]
