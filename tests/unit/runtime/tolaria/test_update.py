"""The flat path must give the bits of a plain torch loop, for every class and option it is used with."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from esper_runtime.tolaria.flat import PIECE_ELEMENTS, squares_of
from esper_runtime.tolaria.update import Path, Update
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

STEPS = 12

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.1),
    "sgd-momentum": partial(SGD, lr=0.1, momentum=0.9),
    "sgd-nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "sgd-dampening": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
    "sgd-foreach": partial(SGD, lr=0.1, momentum=0.9, foreach=True),
    "adam": partial(Adam, lr=0.01),
    "adam-amsgrad": partial(Adam, lr=0.01, amsgrad=True, weight_decay=1e-2),
    "adam-foreach": partial(Adam, lr=0.01, foreach=True, maximize=True),
    "adamw": partial(AdamW, lr=0.01),
    "adamw-amsgrad": partial(AdamW, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw-capturable": partial(AdamW, lr=0.01, foreach=True),
    "adamw-tensor-lr": lambda parameters: AdamW(parameters, lr=torch.tensor(0.01)),
    "rmsprop": partial(RMSprop, lr=0.01),
    "rmsprop-all": partial(RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=1e-2),
    "adagrad": partial(Adagrad, lr=0.05),
    "adagrad-all": partial(Adagrad, lr=0.05, lr_decay=0.1, weight_decay=1e-2, initial_accumulator_value=0.1),
    "adadelta": partial(Adadelta, lr=1.0, weight_decay=1e-2),
    "adamax": partial(Adamax, lr=0.01, weight_decay=1e-2),
    "nadam": partial(NAdam, lr=0.01),
    "nadam-decoupled": partial(NAdam, lr=0.01, weight_decay=1e-2, decoupled_weight_decay=True),
    "radam": partial(RAdam, lr=0.01),
    "radam-decoupled": partial(RAdam, lr=0.01, weight_decay=1e-2, decoupled_weight_decay=True),
    "asgd": partial(ASGD, lr=0.05, t0=4, weight_decay=1e-2),
    "rprop": partial(Rprop, lr=0.01),
}


class Net(nn.Module):
    """Odd sizes, a 0-dim parameter, a tied weight, batch statistics and channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(7)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.inner = nn.Linear(7, 7)
        self.outer = nn.Linear(7, 7)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(7, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3)) * self.scale
        return self.head(torch.tanh(self.outer(torch.tanh(self.inner(hidden)))))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(9, 3, 5, 5, generator=generator), torch.randint(0, 5, (9,), generator=generator))
        for _ in range(STEPS)
    ]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def plain(model: nn.Module, optimizer: Optimizer) -> None:
    for images, labels in batches():
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()


def ours(model: nn.Module, update: Update, *, start: int = 0, end: int = STEPS) -> None:
    for images, labels in batches()[start:end]:
        update.prepare()
        cross_entropy(model(images), labels).backward()
        update.collect()
        assert update.squared_norm() < float("inf")
        update.apply(lambda: torch.tensor(0.0))


def same_bits(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes(), name


@pytest.fixture(params=[PIECE_ELEMENTS, 64, 16], ids=lambda size: f"pieces of {size}")
def piece_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The last ones cut the tensors of Net into many pieces and join few."""
    monkeypatch.setattr("esper_runtime.tolaria.update.PIECE_ELEMENTS", request.param)
    return int(request.param)


@pytest.mark.usefixtures("piece_elements")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flat_update_gives_the_bits_of_a_plain_loop(name: str):
    expected, model = net(), net()
    plain(expected, OPTIMIZERS[name](expected.parameters()))
    update = Update(model, OPTIMIZERS[name](model.parameters()))
    assert update.path is Path.FLAT
    ours(model, update)
    assert update.path is Path.FLAT
    same_bits(model, expected)


def test_fused_optimizer_takes_the_per_tensor_path_because_its_rounding_depends_on_the_tensor():
    model = net()
    assert Update(model, AdamW(model.parameters(), fused=True)).path is Path.PER_TENSOR


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model, optimizer: LBFGS(model.parameters()), "LBFGS is not known to be elementwise"),
        (lambda model, optimizer: Adam(model.parameters(), eps=0.0), "eps is 0"),
        (lambda model, optimizer: type("Mine", (SGD,), {})(model.parameters(), lr=0.1), "Mine is not known"),
        (lambda model, optimizer: hooked(model, optimizer), "hooks on a parameter's gradient"),
        (lambda model, optimizer: step_hooked(optimizer), "step hooks"),
    ],
)
def test_what_the_flat_path_could_not_reproduce_takes_the_per_tensor_path(change, why: str):
    model = net()
    optimizer = change(model, SGD(model.parameters(), lr=0.1))
    update = Update(model, optimizer)
    assert update.path is Path.PER_TENSOR
    assert why in update.why


def hooked(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    next(model.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)
    return optimizer


def step_hooked(optimizer: Optimizer) -> Optimizer:
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-amsgrad", "adagrad-all", "asgd"])
def test_per_tensor_path_gives_the_bits_of_a_plain_loop(name: str):
    expected, model = net(), net()
    plain(expected, OPTIMIZERS[name](expected.parameters()))
    update = Update(model, OPTIMIZERS[name](model.parameters()))
    update.fall_back("the test wants it")
    ours(model, update)
    same_bits(model, expected)


@pytest.mark.usefixtures("piece_elements")
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "adagrad-all", "nadam", "asgd"])
def test_falling_back_in_the_middle_changes_no_bit(name: str):
    expected, model = net(), net()
    plain(expected, OPTIMIZERS[name](expected.parameters()))
    update = Update(model, OPTIMIZERS[name](model.parameters()))
    ours(model, update, end=5)
    update.fall_back("the test wants it")
    ours(model, update, start=5)
    same_bits(model, expected)


class Sometimes(Net):
    """A parameter of the model is used in every third batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Linear(5, 5)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = super().forward(images)
        return self.rare(scores) if self.calls % 3 else scores


@pytest.mark.usefixtures("piece_elements")
@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw", "adam-amsgrad", "rmsprop-all"])
def test_parameter_without_a_gradient_in_a_step_is_skipped_as_torch_skips_it(name: str):
    """A zero gradient would be decayed and would move the moments; None is left alone."""
    torch.manual_seed(0)
    expected = Sometimes()
    torch.manual_seed(0)
    model = Sometimes()
    plain(expected, OPTIMIZERS[name](expected.parameters()))
    update = Update(model, OPTIMIZERS[name](model.parameters()))
    ours(model, update, end=2)
    assert update.path is Path.FLAT
    ours(model, update, start=2)
    assert update.path is Path.PER_TENSOR
    assert re.match(r"rare\.(weight|bias) and 1 more got no gradient in a step", update.why)
    same_bits(model, expected)


def test_parameter_that_never_gets_a_gradient_is_noticed_in_the_first_step():
    torch.manual_seed(0)
    model = Net()
    model.unused = nn.Linear(3, 3)
    update = Update(model, AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    before = model.unused.weight.clone()
    ours(model, update)
    assert torch.equal(model.unused.weight, before)


def test_several_groups_keep_their_options():
    def optimizer(model: Net) -> Optimizer:
        head = [model.head.weight, model.head.bias]
        rest = [p for p in model.parameters() if all(p is not h for h in head)]
        return SGD([{"params": rest, "lr": 0.1, "momentum": 0.9}, {"params": head, "lr": 0.01, "weight_decay": 0.1}])

    expected, model = net(), net()
    plain(expected, optimizer(expected))
    update = Update(model, optimizer(model))
    ours(model, update)
    assert [group["lr"] for group in update.optimizer.param_groups] == [0.1, 0.01]
    same_bits(model, expected)


def test_mixed_dtypes_get_an_arena_each():
    model = net()
    model.head.to(torch.bfloat16)
    update = Update(model, SGD(model.parameters(), lr=0.1))
    assert sorted(str(arena.buffer.dtype) for arena in update.arenas) == ["torch.bfloat16", "torch.float32"]


def test_views_start_at_cache_lines_and_keep_channels_last():
    model = net()
    update = Update(model, SGD(model.parameters(), lr=0.1))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(tensor.data_ptr() % 64 == 0 for arena in update.arenas for tensor in arena.tensors)
    assert all(piece.data_ptr() % 64 == 0 for group in update.optimizer.param_groups for piece in group["params"])


def test_pieces_cover_every_parameter_once_and_stay_small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("esper_runtime.tolaria.update.PIECE_ELEMENTS", 64)
    model = net()
    update = Update(model, SGD(model.parameters(), lr=0.1))
    pieces = update.optimizer.param_groups[0]["params"]
    assert max(piece.numel() for piece in pieces) <= 64
    assert len(pieces) < len(list(model.parameters())) + 189 // 64  # 189 elements of the convolution
    [arena] = update.arenas
    assert sum(piece.numel() for piece in pieces) <= arena.buffer.numel()
    for piece in pieces:
        piece.data.add_(1.0)
    expected = net()
    for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one, other + 1), name


def test_moments_lie_in_one_buffer_once_somebody_looks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("esper_runtime.tolaria.update.PIECE_ELEMENTS", 64)
    model = net()
    update = Update(model, AdamW(model.parameters(), lr=0.01))
    ours(model, update, end=2)
    _, first = update.live_state()
    ours(model, update, start=2, end=4)
    _, second = update.live_state()
    [arena] = update.arenas
    moments = [name for name in first if not name.endswith("step")]
    assert len(moments) == 2
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in moments)
    assert all(first[name].shape == arena.buffer.shape for name in moments)


@pytest.mark.parametrize("change", ["another tensor", "other memory"])
def test_moments_that_were_moved_elsewhere_are_brought_back(monkeypatch: pytest.MonkeyPatch, change: str):
    monkeypatch.setattr("esper_runtime.tolaria.update.PIECE_ELEMENTS", 64)
    model = net()
    update = Update(model, AdamW(model.parameters()))
    ours(model, update, end=2)
    moments = update.live_state()[1]
    (whole,) = (tensor for name, tensor in moments.items() if name.endswith(".exp_avg"))
    state = next(state for state in reversed(list(update.optimizer.state.values())))
    values = state["exp_avg"] + 1.0
    if change == "another tensor":
        state["exp_avg"] = values
    else:
        state["exp_avg"].data = values
    assert update.live_state()[1].keys() == moments.keys()
    assert torch.equal(state["exp_avg"], values)
    assert state["exp_avg"].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_autograds_memory_is_given_back_before_the_next_backward(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("esper_runtime.tolaria.update.PIECE_ELEMENTS", 16)
    model = net()
    update = Update(model, SGD(model.parameters(), lr=0.1))
    ours(model, update, end=1)
    update.prepare()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(piece.grad is not None for piece in update.optimizer.param_groups[0]["params"]) < 8


def test_optimizer_with_a_parameter_outside_the_model_is_refused():
    model = net()
    extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="not in the model"):
        Update(model, SGD([*model.parameters(), extra], lr=0.1))


@pytest.mark.usefixtures("piece_elements")
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "nadam", "adagrad-all", "asgd", "rprop"])
@pytest.mark.parametrize("fallen_back", [False, True])
def test_portable_state_continues_on_either_path(name: str, fallen_back: bool):
    expected, first, second = net(), net(), net()
    plain(expected, OPTIMIZERS[name](expected.parameters()))
    update = Update(first, OPTIMIZERS[name](first.parameters()))
    ours(first, update, end=6)
    skeleton, tensors = update.portable_state()
    saved = {key: tensor.clone() for key, tensor in tensors.items()}
    second.load_state_dict(first.state_dict())
    other = Update(second, OPTIMIZERS[name](second.parameters()))
    if fallen_back:
        other.fall_back("the test wants it")
    other.put_portable_state(skeleton, saved)
    ours(second, other, start=6)
    assert other.path is (Path.PER_TENSOR if fallen_back else Path.FLAT)
    same_bits(second, expected)


def test_not_finite_values_are_seen_and_an_overflowing_sum_is_not_taken_for_one():
    model = net()
    update = Update(model, SGD(model.parameters(), lr=0.1))
    ours(model, update, end=1)
    for gradient in update.gradients():
        gradient.fill_(1e30)
    assert update.squared_norm() == float("inf")
    assert update.all_finite()
    next(update.gradients())[3] = float("inf")
    assert not update.all_finite()


def test_a_sum_of_squares_that_overflows_is_infinite_and_no_error() -> None:
    assert squares_of([torch.full((3,), 1e200, dtype=torch.float64)]) == float("inf")
    assert squares_of([torch.full((2,), 2.0), torch.zeros(0)]) == pytest.approx(8.0)
    assert squares_of([torch.full((4,), 3.0, dtype=torch.bfloat16)]) == pytest.approx(36.0)
