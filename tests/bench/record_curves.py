"""Records the loss curves that the judge of training is tried on: real runs of plain PyTorch on one thread.

nice .venv/bin/python tests/bench/record_curves.py [NAME...]     all of them, or those named; about three minutes

Each run writes its loss and the L2 norm of its gradient, as they were before the optimizer stepped, for every step
until its end or until one of them is not finite. What is done to a run (a raised learning rate, garbage in the
batches) is in its `Recipe` and so known to the step. Runs are seeded; another machine's rounding may still lead to
other curves, which is why the recorded ones are kept in tests/golden/curves.
"""

import argparse
import dataclasses
import json
import math
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gaussian_nll_loss, mse_loss

from tests.support.curves import FILE, Label

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run."""

    name: str
    task: str
    label: Label
    rate: float
    optimizer: str = "adam"
    batch: int = 32
    steps: int = 600
    schedule: str = "constant"
    """constant, warmup (50 steps), cosine, restarts (cosine, four times), onecycle, steps (a tenth at two thirds)."""
    raise_at: int = 0
    """Step from which the learning rate is `raise_by` times as high; 0: never."""
    raise_by: float = 1.0
    garbage: tuple[int, ...] = ()
    """Steps whose batch is replaced by random inputs with random labels."""
    clip: float = 0.0
    """Gradient norm to clip to before the optimizer steps; 0: not."""
    seed: int = 1


class Attention(nn.Module):
    """A GPT-style block."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.mix(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


class CharModel(nn.Module):
    def __init__(self, symbols: int, width: int = 64, context: int = 64) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(Attention(width), Attention(width))
        self.head = nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.blocks(self.symbols(text) + self.places(torch.arange(text.shape[1]))))


class CharLstm(nn.Module):
    def __init__(self, symbols: int, width: int = 64) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.lstm(self.symbols(text))[0])


def mlp(*widths: int, dropout: float = 0.0) -> nn.Module:
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(before, after))
        if i < len(widths) - 2:
            layers += [nn.ReLU(), nn.Dropout(dropout)] if dropout else [nn.ReLU()]
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Task:
    model: nn.Module
    draw: Callable[[int], Batch]
    """A batch of so many samples."""
    spoil: Callable[[Batch], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


def tabular(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[nn.Module, Batch], Tensor]) -> Task:
    """In epochs of reshuffled samples. Garbage has inputs three times as wide as the data, and foreign labels."""
    order: list[int] = []

    def draw(size: int) -> Batch:
        if len(order) < size:
            order[:] = torch.randperm(len(x)).tolist()
        taken = [order.pop() for _ in range(size)]
        return x[taken], y[taken]

    def spoil(batch: Batch) -> Batch:
        labels = y[torch.randint(len(y), (len(batch[1]),))]
        return 3 * x.std() * torch.randn_like(batch[0]), labels

    return Task(model=model, draw=draw, spoil=spoil, loss=loss)


def text(model: Callable[[int], nn.Module], context: int = 64) -> Task:
    """Random places of the text; garbage has random symbols."""
    whole = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    symbols = sorted(set(whole))
    number = {symbol: i for i, symbol in enumerate(symbols)}
    data = torch.tensor([number[symbol] for symbol in whole])

    def draw(size: int) -> Batch:
        starts = torch.randint(len(data) - context - 1, (size, 1))
        window = data[starts + torch.arange(context + 1)]
        return window[:, :-1], window[:, 1:]

    def spoil(batch: Batch) -> Batch:
        noise = torch.randint(len(symbols), (len(batch[0]), context + 1))
        return noise[:, :-1], noise[:, 1:]

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())

    return Task(model=model(len(symbols)), draw=draw, spoil=spoil, loss=loss)


def classified(model: nn.Module) -> Task:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = torch.tensor(x, dtype=torch.float32) / 16
    return tabular(model, data, torch.tensor(y), lambda net, batch: cross_entropy(net(batch[0]), batch[1]))


def regression(model: nn.Module, x: Tensor, y: Tensor) -> Task:
    return tabular(model, x, y, lambda net, batch: mse_loss(net(batch[0]), batch[1]))


def synthetic(model: nn.Module, noise: float) -> Task:
    x = torch.randn(2048, 8)
    y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3] + noise * torch.randn(2048, 1)
    return regression(model, x, y)


def linear_system() -> Task:
    """A linear map without noise: the loss falls as far as float32 allows."""
    x = torch.randn(512, 16)
    return regression(nn.Linear(16, 4), x, x @ torch.randn(16, 4) / 4)


def diabetes() -> Task:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    inputs = torch.tensor(x * math.sqrt(len(x)), dtype=torch.float32)
    targets = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32).unsqueeze(1)
    return regression(mlp(10, 64, 1), inputs, targets)


def likelihood() -> Task:
    """Gaussian negative log-likelihood of targets with little noise: falls below zero."""
    x = torch.randn(2048, 4)
    y = torch.sin(x[:, :1]) + 0.05 * torch.randn(2048, 1)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        mean, spread = net(batch[0]).chunk(2, dim=1)
        return gaussian_nll_loss(mean, batch[1], nn.functional.softplus(spread) + 1e-4)

    return tabular(mlp(4, 64, 64, 2), x, y, loss)


def autoencoder() -> Task:
    from sklearn.datasets import load_digits

    data = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    return regression(mlp(64, 32, 8, 32, 64), data, data)


TASKS: dict[str, Callable[[], Task]] = {
    "synthetic": lambda: synthetic(mlp(8, 64, 64, 1), 0.0),
    "noisy": lambda: synthetic(mlp(8, 64, 64, 1), 0.5),
    "linear": linear_system,
    "diabetes": diabetes,
    "digits-mlp": lambda: classified(mlp(64, 64, 10)),
    "digits-deep": lambda: classified(mlp(64, 64, 64, 64, 64, 10)),
    "digits-dropout": lambda: classified(mlp(64, 128, 64, 10, dropout=0.5)),
    "digits-cnn": lambda: classified(cnn()),
    "nll": likelihood,
    "autoencoder": autoencoder,
    "char": lambda: text(CharModel),
    "lstm": lambda: text(CharLstm),
}
OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate),
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate),
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
    "rmsprop": lambda parameters, rate: torch.optim.RMSprop(parameters, lr=rate),
}
SINGLES = (150, 263, 264 + 40, 451)
"""Steps of single bad batches: never two in a row."""


def run_of(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def recipes() -> list[Recipe]:
    healthy, plateau, benign = Label.HEALTHY, Label.PLATEAU, Label.BENIGN_SPIKE
    bad, diverges = Label.BAD_BATCHES, Label.DIVERGENCE
    return [
        Recipe(name="synthetic-adam", task="synthetic", label=healthy, rate=1e-3, steps=1500),
        Recipe(name="synthetic-adam-fast", task="synthetic", label=healthy, rate=1e-2, steps=1500, batch=64),
        Recipe(name="synthetic-momentum-cosine", task="synthetic", label=healthy, rate=5e-2, optimizer="momentum",
               steps=1200, schedule="cosine"),
        Recipe(name="linear-sgd", task="linear", label=healthy, rate=0.1, optimizer="sgd", steps=1000, batch=16),
        Recipe(name="linear-adam", task="linear", label=healthy, rate=1e-2, steps=1500, batch=64),
        Recipe(name="diabetes-adam", task="diabetes", label=healthy, rate=1e-3, steps=1200, batch=32),
        Recipe(name="diabetes-small-batch", task="diabetes", label=healthy, rate=5e-4, steps=1000, batch=4),
        Recipe(name="digits-mlp-adam", task="digits-mlp", label=healthy, rate=3e-3, steps=1500, batch=64),
        Recipe(name="digits-mlp-adam-memorised", task="digits-mlp", label=healthy, rate=1e-2, steps=1500, batch=64),
        Recipe(name="digits-mlp-small-batch", task="digits-mlp", label=healthy, rate=1e-3, steps=1500, batch=8),
        Recipe(name="digits-mlp-sgd", task="digits-mlp", label=healthy, rate=0.1, optimizer="sgd", steps=1000),
        Recipe(name="digits-cnn-adam", task="digits-cnn", label=healthy, rate=3e-3, steps=1000, batch=32),
        Recipe(name="digits-cnn-momentum", task="digits-cnn", label=healthy, rate=2e-2, optimizer="momentum",
               steps=1000, batch=16),
        Recipe(name="digits-cnn-onecycle", task="digits-cnn", label=healthy, rate=1e-2, steps=800, schedule="onecycle"),
        Recipe(name="digits-deep-rmsprop", task="digits-deep", label=healthy, rate=1e-3, optimizer="rmsprop",
               steps=1000, batch=32),
        Recipe(name="digits-dropout-tiny-batch", task="digits-dropout", label=healthy, rate=1e-3, steps=1200, batch=8),
        Recipe(name="nll-adam", task="nll", label=healthy, rate=2e-3, steps=1500, batch=64),
        Recipe(name="nll-small-batch", task="nll", label=healthy, rate=1e-3, steps=1200, batch=8),
        Recipe(name="autoencoder-adam", task="autoencoder", label=healthy, rate=2e-3, steps=1000, batch=32),
        Recipe(name="char-adamw-warmup", task="char", label=healthy, rate=2e-3, optimizer="adamw", steps=900, batch=16,
               schedule="warmup"),
        Recipe(name="char-adamw-small-batch", task="char", label=healthy, rate=1e-3, optimizer="adamw", steps=800,
               batch=4),
        Recipe(name="char-adamw-high", task="char", label=healthy, rate=1e-2, optimizer="adamw", steps=500, batch=8,
               clip=1.0, schedule="warmup"),
        Recipe(name="lstm-adam", task="lstm", label=healthy, rate=5e-3, steps=600, batch=8),
        Recipe(name="digits-restarts", task="digits-mlp", label=healthy, rate=1e-2, steps=1200, schedule="restarts"),
        Recipe(name="char-restarts", task="char", label=healthy, rate=3e-3, steps=600, batch=8, schedule="restarts"),
        Recipe(name="cnn-raised-harmlessly", task="digits-cnn", label=healthy, rate=2e-3, steps=700, raise_at=400,
               raise_by=3.0),
        Recipe(name="digits-steps", task="digits-mlp", label=healthy, rate=3e-2, steps=900, schedule="steps"),

        Recipe(name="noisy-plateau", task="noisy", label=plateau, rate=1e-3, steps=1500, batch=16, optimizer="adam"),
        Recipe(name="diabetes-plateau", task="diabetes", label=plateau, rate=1e-3, optimizer="sgd", steps=1200),
        Recipe(name="digits-dropout-plateau", task="digits-dropout", label=plateau, rate=3e-2, steps=1000),
        Recipe(name="digits-high-rate-plateau", task="digits-deep", label=plateau, rate=3e-2, steps=800),
        Recipe(name="lstm-plateau", task="lstm", label=plateau, rate=0.5, optimizer="sgd", steps=500, batch=8),

        Recipe(name="digits-mlp-spikes", task="digits-mlp", label=benign, rate=3e-3, batch=64, garbage=SINGLES),
        Recipe(name="digits-cnn-spikes", task="digits-cnn", label=benign, rate=3e-3, garbage=SINGLES),
        Recipe(name="digits-sgd-spikes", task="digits-mlp", label=benign, rate=0.1, optimizer="sgd", garbage=SINGLES),
        Recipe(name="diabetes-spikes", task="diabetes", label=benign, rate=1e-3, garbage=SINGLES),
        Recipe(name="synthetic-spikes", task="synthetic", label=benign, rate=1e-3, garbage=SINGLES, clip=1.0),
        Recipe(name="nll-spikes", task="nll", label=benign, rate=1e-3, garbage=SINGLES, clip=1.0),
        Recipe(name="char-spikes", task="char", label=benign, rate=2e-3, optimizer="adamw", batch=8, garbage=SINGLES,
               schedule="warmup"),
        Recipe(name="lstm-spikes", task="lstm", label=benign, rate=5e-3, batch=8, steps=500, garbage=SINGLES[:3]),

        Recipe(name="digits-mlp-bad-batches", task="digits-mlp", label=bad, rate=3e-3, steps=500,
               garbage=run_of(400, 6)),
        Recipe(name="digits-cnn-bad-batches", task="digits-cnn", label=bad, rate=1e-3, steps=400,
               garbage=run_of(300, 8)),
        Recipe(name="diabetes-bad-batches", task="diabetes", label=bad, rate=1e-3, steps=500, garbage=run_of(350, 5)),
        Recipe(name="synthetic-bad-batches", task="synthetic", label=bad, rate=1e-3, steps=600,
               garbage=run_of(500, 5)),
        Recipe(name="nll-bad-batches", task="nll", label=bad, rate=1e-3, steps=600, garbage=run_of(500, 6)),
        Recipe(name="char-bad-batches", task="char", label=bad, rate=2e-3, optimizer="adamw", batch=8, steps=450,
               schedule="warmup", garbage=run_of(350, 6)),
        Recipe(name="lstm-bad-batches", task="lstm", label=bad, rate=5e-3, batch=8, steps=450, garbage=run_of(400, 5)),

        Recipe(name="diabetes-explodes-at-once", task="diabetes", label=diverges, rate=2.0, optimizer="momentum",
               steps=300),
        Recipe(name="linear-explodes-at-once", task="linear", label=diverges, rate=6.0, optimizer="sgd", steps=300),
        Recipe(name="digits-explodes-at-once", task="digits-deep", label=diverges, rate=5.0, optimizer="momentum",
               steps=300),
        Recipe(name="nll-explodes-early", task="nll", label=diverges, rate=1e-3, steps=300, raise_at=15,
               raise_by=300.0),
        Recipe(name="char-explodes-early", task="char", label=diverges, rate=2e-3, optimizer="adamw", steps=200,
               batch=8, raise_at=30, raise_by=50.0),
        Recipe(name="char-explodes-in-warmup", task="char", label=diverges, rate=1.0, optimizer="adamw", steps=300,
               batch=8, schedule="warmup"),
        Recipe(name="linear-raised", task="linear", label=diverges, rate=0.05, optimizer="sgd", steps=600,
               raise_at=400, raise_by=40.0, batch=16),
        Recipe(name="synthetic-raised", task="synthetic", label=diverges, rate=1e-2, optimizer="momentum", steps=700,
               raise_at=500, raise_by=100.0),
        Recipe(name="diabetes-raised", task="diabetes", label=diverges, rate=1e-2, optimizer="sgd", steps=700,
               raise_at=500, raise_by=200.0),
        Recipe(name="digits-mlp-raised", task="digits-mlp", label=diverges, rate=3e-3, steps=800, raise_at=600,
               raise_by=100.0),
        Recipe(name="digits-sgd-raised", task="digits-deep", label=diverges, rate=0.1, optimizer="momentum", steps=600,
               raise_at=400, raise_by=30.0),
        Recipe(name="digits-cnn-raised", task="digits-cnn", label=diverges, rate=1e-3, steps=600, raise_at=400,
               raise_by=300.0),
        Recipe(name="autoencoder-raised", task="autoencoder", label=diverges, rate=2e-3, steps=700, raise_at=500,
               raise_by=50.0),
        Recipe(name="digits-mlp-raised-mildly", task="digits-mlp", label=diverges, rate=3e-3, steps=800, raise_at=600,
               raise_by=50.0),
        Recipe(name="digits-deep-raised-mildly", task="digits-deep", label=diverges, rate=1e-3, steps=700,
               raise_at=500, raise_by=40.0),
        Recipe(name="nll-raised", task="nll", label=diverges, rate=1e-3, steps=800, raise_at=600, raise_by=100.0),
        Recipe(name="lstm-raised", task="lstm", label=diverges, rate=5e-3, steps=450, batch=8, raise_at=300,
               raise_by=60.0),
        Recipe(name="char-raised", task="char", label=diverges, rate=2e-3, optimizer="adamw", steps=500, batch=8,
               raise_at=350, raise_by=100.0),
        Recipe(name="char-raised-mildly", task="char", label=diverges, rate=1e-3, optimizer="adamw", steps=600,
               batch=8, raise_at=400, raise_by=20.0),
        Recipe(name="char-raised-slow", task="char", label=diverges, rate=1e-3, optimizer="adam", steps=600,
               batch=8, raise_at=400, raise_by=50.0),
    ]  # fmt: skip


def factor(recipe: Recipe, step: int) -> float:
    """Of the learning rate at `step`, counted from 1."""
    share = step / recipe.steps
    scheduled = {
        "constant": 1.0,
        "warmup": min(1.0, step / 50),
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "restarts": 0.5 * (1 + math.cos(math.pi * (4 * share % 1.0))),
        "onecycle": min(step / (0.3 * recipe.steps), max(0.01, (1 - share) / 0.7)),
        "steps": 1.0 if share < 2 / 3 else 0.1,
    }[recipe.schedule]
    return scheduled * (recipe.raise_by if 0 < recipe.raise_at <= step else 1.0)


def record(recipe: Recipe) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of every step."""
    torch.manual_seed(recipe.seed)
    task = TASKS[recipe.task]()
    optimizer = OPTIMIZERS[recipe.optimizer](task.model.parameters(), recipe.rate)
    losses: list[float] = []
    norms: list[float] = []
    for step in range(1, recipe.steps + 1):
        batch = task.draw(recipe.batch)
        if step in recipe.garbage:
            batch = task.spoil(batch)
        optimizer.zero_grad()
        loss = task.loss(task.model, batch)
        loss.backward()
        gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        losses.append(loss.item())
        norms.append(norm)
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            break
        if recipe.clip and norm > recipe.clip:
            for gradient in gradients:
                gradient.mul_(recipe.clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * factor(recipe, step)
        optimizer.step()
    return losses, norms


def save(found: dict[str, tuple[Recipe, Sequence[float], Sequence[float]]]) -> None:
    """One compressed file without pickles: two float32 rows per curve, and the recipes as JSON bytes."""
    described = {name: dataclasses.asdict(recipe) for name, (recipe, _, _) in found.items()}
    arrays = {
        name: np.array([losses, norms], dtype=np.float64).astype(np.float32)
        for name, (_, losses, norms) in found.items()
    }
    meta = np.frombuffer(json.dumps(described).encode(), dtype=np.uint8)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(FILE, recipes=meta, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="record these alone, and save nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for recipe in recipes():
        if arguments.names and recipe.name not in arguments.names:
            continue
        began = time.perf_counter()
        losses, norms = record(recipe)
        found[recipe.name] = recipe, losses, norms
        shown = " ".join(f"{losses[i]:.3g}" for i in range(0, len(losses), max(1, len(losses) // 12)))
        print(f"{recipe.name:30} {len(losses):5} steps {time.perf_counter() - began:5.1f} s  {shown}", flush=True)
    if not arguments.names:
        save(found)


if __name__ == "__main__":
    main()
