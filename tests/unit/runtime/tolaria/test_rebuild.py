"""Parameters come and go and optimizers change their class; what stays keeps every bit of its state."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Checkpoint
from esper_runtime.tolaria.commands import Refused
from esper_runtime.tolaria.data import Position
from esper_runtime.tolaria.groups import GroupError, seed_group
from esper_runtime.tolaria.memory import Memory
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.optimizers import Factory, OptimizerRebuildError, factory_for
from esper_runtime.tolaria.rebuild import Rebuilds, RebuildSkippedError, StormGuard, as_command
from esper_runtime.tolaria.update import Path, Update
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from tests.support.notices import Notices

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd-momentum": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": partial(AdamW, lr=0.01, amsgrad=True),
    "adamw-tensor-lr": lambda parameters: AdamW(parameters, lr=torch.tensor(0.01)),
    "adagrad": partial(Adagrad, lr=0.05, initial_accumulator_value=0.1),
    "rmsprop": partial(RMSprop, lr=0.01, momentum=0.9, centered=True),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(5, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(images)).mean(dim=(2, 3)) * self.scale)


def net(kind: type[nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    return kind()


def batches(begin: int, end: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        yield torch.randn(4, 2, 4, 4, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def train(model: nn.Module, update: Update, begin: int, end: int) -> None:
    for images, labels in batches(begin, end):
        update.prepare()
        cross_entropy(model(images), labels).backward()
        update.collect()
        update.apply(lambda: torch.tensor(0.0))


def same_bits(one: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    for name, a in one.state_dict().items():
        assert a.numpy().tobytes() == theirs[name].numpy().tobytes(), name


def same_state(one: Update, other: Update) -> None:
    (skeleton, ours), (theirs_skeleton, theirs) = one.portable_state(), other.portable_state()
    assert skeleton["states"] == theirs_skeleton["states"]
    assert {n: t.numpy().tobytes() for n, t in ours.items()} == {n: t.numpy().tobytes() for n, t in theirs.items()}


def unchanged(update: Update) -> Factory:
    """Makes the very same optimizer."""
    options = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in update.optimizer.param_groups]
    kind: Any = type(update.optimizer)
    return lambda groups: kind([{**o, **g} for o, g in zip(options, groups, strict=True)])


# Rebuilding


@pytest.mark.row("T15")
@pytest.mark.parametrize("fallen_back", [False, True], ids=["flat", "per-tensor"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rebuild_without_a_change_leaves_the_next_ten_steps_bit_for_bit(
    name: str, fallen_back: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("esper_runtime.tolaria.update.PIECE_ELEMENTS", 64)
    expected, model = net(), net()
    plain, update = (Update(m, OPTIMIZERS[name](m.parameters())) for m in (expected, model))
    if fallen_back:
        for each in (plain, update):
            each.optimizer.register_step_pre_hook(lambda *_: None)
            each.fall_back("the test wants it")
    train(expected, plain, 0, 3)
    train(model, update, 0, 3)
    old = update.optimizer

    def factory(groups: list[dict[str, Any]]) -> Optimizer:
        new = unchanged_factory(groups)
        if fallen_back:
            new.register_step_pre_hook(lambda *_: None)
        return new

    unchanged_factory = unchanged(update)
    carried = update.rebuild(factory)
    assert update.optimizer is not old
    assert (carried.preserved, carried.ratio) == (carried.total, 1.0)
    assert carried.total > 0
    assert update.path is (Path.PER_TENSOR if fallen_back else Path.FLAT)
    train(expected, plain, 3, 13)
    train(model, update, 3, 13)
    same_bits(model, expected)
    same_state(update, plain)


@pytest.mark.row("T15")
@pytest.mark.row("T16")
def test_another_class_takes_over_groups_rates_and_what_means_the_same():
    model = net()
    head = list(model.head.parameters())
    body = [p for p in model.parameters() if all(p is not h for h in head)]
    update = Update(model, Adam([{"params": body, "lr": 0.1, "betas": (0.8, 0.9)}, {"params": head, "lr": 0.01}]))
    train(model, update, 0, 3)
    _, before = update.portable_state()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    carried = update.rebuild(factory_for("adamw", update.optimizer))
    assert type(update.optimizer) is AdamW
    assert [group["lr"] for group in update.optimizer.param_groups] == [0.1, 0.01]
    assert [group["betas"] for group in update.optimizer.param_groups] == [(0.8, 0.9), (0.9, 0.999)]
    assert carried.preserved == carried.total == 15  # 5 parameters, 3 values each
    _, after = update.portable_state()
    assert all(torch.equal(kept[name], after[name]) for name in kept)
    carried = update.rebuild(factory_for("sgd", update.optimizer))
    assert (carried.preserved, carried.total, carried.ratio) == (0, 15, 0.0)
    assert update.portable_state()[1] == {}
    assert [group["momentum"] for group in update.optimizer.param_groups] == [0.9, 0.9]
    train(model, update, 3, 5)
    assert sorted(update.portable_state()[1])[0] == "conv.bias.momentum_buffer"


def test_option_that_needs_more_state_gets_it_as_torch_would_have_made_it():
    expected, model = net(), net()
    plain = Update(expected, Adam(expected.parameters(), lr=0.01))
    update = Update(model, Adam(model.parameters(), lr=0.01))
    train(expected, plain, 0, 3)
    train(model, update, 0, 3)
    carried = update.rebuild(partial(Adam, amsgrad=True))
    assert carried.ratio == 1.0
    plain.fall_back("to give torch's own optimizer what it lacks")
    for state in plain.optimizer.state.values():
        state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
    plain.optimizer.param_groups[0]["amsgrad"] = True
    train(expected, plain, 3, 8)
    train(model, update, 3, 8)
    same_bits(model, expected)


def wrong_shape(update: Update) -> Factory:
    update.fall_back("the test wants it")
    state = update.optimizer.state[next(p for p in update.optimizer.param_groups[0]["params"] if p.ndim == 4)]
    state["exp_avg"] = torch.zeros(7)
    return unchanged(update)


class Mine(AdamW):
    """Of nobody's acquaintance."""


@pytest.mark.row("T15")
@pytest.mark.parametrize(
    ("factory_of", "words"),
    [
        (lambda update: lambda groups: AdamW(groups, betas=(2.0, 2.0)), "could not be made: ValueError"),
        (lambda update: lambda groups: nn.Linear(1, 1), "it is a Linear, not a torch optimizer"),
        (lambda update: lambda groups: AdamW(groups[0]["params"][:1], lr=0.01), "not have the same parameters"),
        (lambda update: lambda groups: AdamW(groups[0]["params"], lr=0.5), "changes a learning rate"),
        (lambda update: Mine, "a Mine could not be made again after a restart"),
        (wrong_shape, "state exp_avg of shape .7,. does not fit its parameter of shape .5, 2, 3, 3."),
    ],
)
def test_optimizer_that_cannot_take_over_leaves_the_old_one_with_its_state(
    factory_of: Callable[[Update], Factory], words: str
):
    model = net()
    update = Update(model, AdamW(model.parameters(), lr=0.01))
    train(model, update, 0, 2)
    factory, old, path = factory_of(update), update.optimizer, update.path
    before = [(name, tensor.clone()) for name, tensor in update.portable_state()[1].items()]
    with pytest.raises(OptimizerRebuildError, match=words):
        update.rebuild(factory)
    assert update.optimizer is old
    assert update.path is path
    after = update.portable_state()[1]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before)
    if factory_of is not wrong_shape:
        expected = net()
        plain = Update(expected, AdamW(expected.parameters(), lr=0.01))
        train(expected, plain, 0, 4)
        train(model, update, 2, 4)
        same_bits(model, expected)


def test_lost_state_is_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "esper_runtime.tolaria.optimizers.own",
        lambda value: value + 1 if isinstance(value, torch.Tensor) and value.ndim == 4 else value,
    )
    model = net()
    update = Update(model, AdamW(model.parameters(), lr=0.01))
    train(model, update, 0, 1)
    with pytest.raises(OptimizerRebuildError, match="13 of 15 values of its state were kept"):
        update.rebuild(unchanged(update))


def test_optimizer_that_is_not_elementwise_keeps_its_state_too():
    expected, model = net(), net()
    for each in (expected, model):  # LBFGS cannot flatten gradients of channels_last
        each.conv.to(memory_format=torch.contiguous_format)
    make = partial(LBFGS, lr=0.1, max_iter=3, history_size=4)
    plain, update = Update(expected, make(expected.parameters())), Update(model, make(model.parameters()))

    def run(model: nn.Module, update: Update, begin: int, end: int) -> None:
        for images, labels in batches(begin, end):

            def closure(images: torch.Tensor = images, labels: torch.Tensor = labels) -> torch.Tensor:
                update.prepare()
                loss = cross_entropy(model(images), labels)
                loss.backward()
                return loss.detach()

            with torch.enable_grad():
                update.apply(closure)

    run(expected, plain, 0, 2)
    run(model, update, 0, 2)
    update.rebuild(partial(LBFGS, max_iter=3, history_size=4))
    run(expected, plain, 2, 5)
    run(model, update, 2, 5)
    same_bits(model, expected)


def test_tensor_that_the_model_has_replaced_is_taken_up_by_its_name():
    model = net()
    update = Update(model, SGD(model.parameters(), lr=0.1, momentum=0.9))
    train(model, update, 0, 2)
    moment = update.portable_state()[1]["head.weight.momentum_buffer"].clone()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    model.head.bias = nn.Parameter(torch.zeros(3))
    model.conv = nn.Conv2d(2, 5, 5, padding=2)  # of another shape: its state is of no use
    carried = update.rebuild(unchanged(update))
    assert carried.preserved == carried.total == 4
    states = update.portable_state()[1]
    assert torch.equal(states["head.weight.momentum_buffer"], moment)
    assert "conv.weight.momentum_buffer" not in states
    before = model.conv.weight.detach().clone()
    train(model, update, 2, 3)
    assert not torch.equal(before, model.conv.weight)


# Saved states


@pytest.mark.parametrize("form", ["live", "portable"])
def test_state_brings_back_the_optimizer_it_is_of(form: str):
    """After a restart the workload makes its own optimizer again; the state says that it had been rebuilt."""
    expected, model = net(), net()
    update = Update(expected, SGD(expected.parameters(), lr=0.1, momentum=0.5))
    train(expected, update, 0, 2)
    first = saved(update, form)
    update.rebuild(factory_for("rmsprop", update.optimizer))
    train(expected, update, 2, 4)
    model.load_state_dict(expected.state_dict())
    other = Update(model, SGD(model.parameters(), lr=0.1, momentum=0.5))
    put(other, form, saved(update, form))
    assert type(other.optimizer) is RMSprop
    train(expected, update, 4, 7)
    train(model, other, 4, 7)
    same_bits(model, expected)
    put(other, form, first)  # a rollback to before the rebuild
    assert type(other.optimizer) is SGD
    assert other.optimizer.param_groups[0]["momentum"] == 0.5
    assert other.learning_rate == 0.1


Saved = tuple[Path, dict[str, Any], dict[str, torch.Tensor]]


def saved(update: Update, form: str) -> Saved:
    skeleton, tensors = update.live_state() if form == "live" else update.portable_state()
    return update.path, skeleton, {name: tensor.clone() for name, tensor in tensors.items()}


def put(update: Update, form: str, state: Saved) -> None:
    path, skeleton, tensors = state
    if form == "live":
        update.put_live_state(path, skeleton, tensors)
    else:
        update.put_portable_state(skeleton, tensors)


# Adding and removing


class Grown(Net):
    """With a seed that adds nothing until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.seed: nn.Module = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = super().forward(images)
        return self.seed(scores)


def grow(model: Grown) -> list[nn.Parameter]:
    torch.manual_seed(1)
    model.seed = nn.Linear(3, 3)
    return list(model.seed.parameters())


@pytest.mark.row("T14")
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw-tensor-lr"])
def test_added_parameters_train_as_in_torch_and_the_old_ones_keep_their_state(name: str):
    expected, model = net(Grown), net(Grown)
    optimizer = OPTIMIZERS[name](expected.parameters())
    update = Update(model, OPTIMIZERS[name](model.parameters()))

    def plain(begin: int, end: int) -> None:
        for images, labels in batches(begin, end):
            optimizer.zero_grad()
            cross_entropy(expected(images), labels).backward()
            optimizer.step()

    plain(0, 3)
    train(model, update, 0, 3)
    group = seed_group("seed", update.groups[0], warmup_steps=0, step=3, epoch=1)
    update.add_parameters(grow(model), group, weight_decay=0.01)
    optimizer.add_param_group({"params": grow(expected), "lr": group.written, "weight_decay": 0.01})
    for parameter in optimizer.param_groups[1]["params"] if name == "adagrad" else ():
        optimizer.state[parameter] = {"step": torch.tensor(0.0), "sum": torch.full_like(parameter, 0.1)}
    assert update.path is Path.FLAT
    assert [g.name for g in update.groups] == ["all", "seed"]
    plain(3, 8)
    train(model, update, 3, 8)
    same_bits(model, expected)
    assert update.path is Path.FLAT


def test_what_cannot_be_added_changes_nothing():
    model = net(Grown)
    update = Update(model, SGD(model.parameters(), lr=0.1, momentum=0.9))
    group = partial(seed_group, "seed", update.groups[0], warmup_steps=0, step=0, epoch=0)
    with pytest.raises(ValueError, match="in no group yet"):
        update.add_parameters([nn.Parameter(torch.zeros(2))], group())
    with pytest.raises(ValueError, match="in no group yet"):
        update.add_parameters([model.scale], group())
    with pytest.raises(ValueError, match="in no group yet"):
        update.add_parameters([], group())
    with pytest.raises(GroupError, match="'all' is there already"):
        update.add_parameters(grow(model), seed_group("all", update.groups[0], warmup_steps=0, step=0, epoch=0))
    assert [g.name for g in update.groups] == ["all"]
    assert update.path is Path.FLAT
    train(model, update, 0, 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_removed_parameters_stay_as_they_are_and_the_rest_keeps_its_state(name: str):
    expected, model = net(Grown), net(Grown)
    for each in (expected, model):
        grow(each)
    updates = []
    for each in (expected, model):
        seed = list(each.seed.parameters())
        rest = [p for p in each.parameters() if all(p is not s for s in seed)]
        updates.append(Update(each, OPTIMIZERS[name]([{"params": rest}, {"params": seed}])))
    plain, update = updates
    train(expected, plain, 0, 3)
    train(model, update, 0, 3)
    update.remove_parameters(["seed.weight", "seed.bias", "scale"])
    assert [g.name for g in update.groups] == ["group-0"]
    assert sorted(name for name, _ in update.parameters()) == ["conv.bias", "conv.weight", "head.bias", "head.weight"]
    frozen = [tensor.clone() for tensor in (expected.seed.weight, expected.seed.bias, expected.scale)]
    for images, labels in batches(3, 6):
        plain.prepare()
        cross_entropy(expected(images), labels).backward()
        plain.collect()
        plain.apply(lambda: torch.tensor(0.0))
        with torch.no_grad():
            for tensor, value in zip((expected.seed.weight, expected.seed.bias, expected.scale), frozen, strict=True):
                tensor.copy_(value)
    train(model, update, 3, 6)
    same_bits(model, expected)
    with pytest.raises(ValueError, match=r"seed\.bias is in no group"):
        update.remove_parameters(["seed.bias"])
    with pytest.raises(ValueError, match="no parameter would be left"):
        update.remove_parameters(["conv.bias", "conv.weight", "head.bias", "head.weight"])


# At a boundary, and not too often


class State:
    """What Rebuilds uses of a TrainState."""

    def __init__(self) -> None:
        self.model = net()
        self.update = Update(self.model, AdamW(self.model.parameters(), lr=0.01))
        self.step = 0
        self.epoch = 0
        self.loader = self
        self.position = Position(0, 0)


class Bench:
    def __init__(self, guard: StormGuard) -> None:
        self.now = 0.0
        self.metrics, self.notices, self.state = Metrics(None), Notices(), State()
        memory = Memory(None, config=Checkpoint(), events=self.notices.events, metrics=self.metrics)
        self.rebuilds = Rebuilds(
            memory=memory,
            metrics=self.metrics,
            events=self.notices.events,
            guard=guard,
            monotonic=lambda: self.now,
        )

    def ask(self, optimizer_id: str = "adamw", *, step: int, now: float = 0.0) -> bool:
        self.state.step, self.now = step, now
        try:
            self.rebuilds.rebuild_for(self.state, optimizer_id)  # type: ignore[arg-type]
        except RebuildSkippedError:
            return False
        return True

    def count(self, name: str) -> float | None:
        return self.metrics.value(f"tolaria.opt.{name}_total")


@pytest.mark.row("T15")
def test_three_attempts_within_a_guard_of_two_steps_are_two_rebuilds_and_one_skip():
    bench = Bench(StormGuard(steps=2, seconds=0.0))
    assert [bench.ask(step=step) for step in (10, 11, 12)] == [True, False, True]
    assert (bench.count("rebuilds"), bench.count("rebuild_skipped"), bench.count("rebuild_failures")) == (2, 1, None)
    assert bench.notices.reasons() == [RunReason.OPTIMIZER_REBUILT] * 2
    assert bench.metrics.value("tolaria.opt.state_preserved_ratio") == 1.0
    assert bench.metrics.value("tolaria.opt.rebuild_latency_ms") == 0.0


@pytest.mark.row("T15")
def test_the_guard_counts_seconds_too_and_a_rollback_does_not_trick_it():
    bench = Bench(StormGuard())
    assert bench.ask(step=100, now=0.0)
    assert not bench.ask(step=100, now=60.0)
    assert not bench.ask(step=200, now=9.0)
    assert not bench.ask(step=50, now=9.0)
    assert bench.ask(step=50, now=10.0)


@pytest.mark.row("T15")
def test_within_an_epoch_nothing_changes():
    bench = Bench(StormGuard(steps=0, seconds=0.0))
    bench.state.position = Position(0, 1)
    old = bench.state.update.optimizer
    assert not bench.ask(step=1)
    with pytest.raises(RebuildSkippedError, match="between epochs only"):
        bench.rebuilds.remove_parameters(bench.state, ["scale"])  # type: ignore[arg-type]
    with pytest.raises(RebuildSkippedError, match="between epochs only"):
        bench.rebuilds.add_parameters(bench.state, [], name="seed", warmup_steps=1)  # type: ignore[arg-type]
    assert bench.state.update.optimizer is old
    assert bench.count("rebuild_skipped") == 1


@pytest.mark.row("T15")
def test_failed_rebuild_is_counted_and_told_and_the_old_optimizer_goes_on():
    bench = Bench(StormGuard(steps=0, seconds=0.0))
    old = bench.state.update.optimizer
    with pytest.raises(OptimizerRebuildError, match="optimizer_id is 'lion'; give one of sgd, adam, adamw, rmsprop"):
        bench.ask("lion", step=0)
    assert bench.state.update.optimizer is old
    assert bench.count("rebuild_failures") == 1
    [(reason, message)] = bench.notices.told
    assert reason == RunReason.OPTIMIZER_REBUILD_FAILED
    assert "not rebuilt as lion" in message
    assert bench.ask("sgd", step=1)
    assert type(bench.state.update.optimizer) is SGD


def test_command_that_comes_too_soon_is_refused_and_no_failure():
    bench = Bench(StormGuard())
    command = as_command(bench.rebuilds)
    command(bench.state, "adam")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="the last rebuild was 0 steps ago"):
        command(bench.state, "sgd")  # type: ignore[arg-type]
