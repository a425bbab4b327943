"""A small GPT-style model of characters, on the texts of `pydoc_data.topics` that come with Python: no download.

The topics (Python's language reference, half a million characters and more) are joined in the order of their names; the
last tenth is held out. They differ between versions of Python, and so does the vocabulary, which is made from them: a
checkpoint of this workload fits only the version that it was made with.

The defaults in a bare loop, with the text of Python 3.11: 2.17 bits per character on the held-out text after three of
the eight epochs, 1.97 after four, 1.80 after seven; an epoch took 19 s on two cores.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from esper_runtime.schedules import cosine
from esper_runtime.workload import Batch, Sums, Workload, read_config

HELD_OUT = 0.1
"""Share of the text, at its end."""
CLIP = 1.0
LEAST = 0.1
"""Of the learning rate, at the end of training."""
_BETAS = (0.9, 0.98)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of runtime.config. `layers: 1, width: 32, context: 32, max_chars: 20000, epochs: 1` is a smoke test."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 64
    """Characters that a prediction may look back on."""
    dropout: float = 0.0
    tied: bool = True
    """The head that scores characters is the embedding's own weight."""
    batch_size: int = 32
    epochs: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    """Of matrices; biases and norms are not decayed."""
    max_chars: int = 0
    """Only so much of the text, from its beginning; 0 = all."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"runtime.config.{name} is {getattr(self, name)}; give at least 1")
        if self.width % self.heads:
            raise ValueError(f"runtime.config.width is {self.width}, no multiple of heads, {self.heads}")


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). (batch, context, width) in and out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.dropout = config.dropout
        self.before_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self._attention(self.before_attention(x)))
        added: Tensor = self.drop(self.mlp(self.before_mlp(x)))
        return x + added

    def _attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        projected: Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


class Network(nn.Module):
    """Scores of the next character at every place: (batch, length) of ids -> (batch, length, vocabulary)."""

    def __init__(self, config: Config, *, vocabulary: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, config.width)
        self.places = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.characters.weight
        self.apply(_initialise)
        for name, parameter in self.named_parameters():  # what adds to the residual stream starts small, as in GPT-2
            if name.endswith(("projection.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.characters(ids) + self.places(places))
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build(config: Mapping[str, Any]) -> Workload:
    """Entrypoint `esper_runtime.workloads.chars:build`."""
    c = read_config(Config, config)
    ids, vocabulary = encoded(text(c.max_chars))
    border = round(len(ids) * (1 - HELD_OUT))
    return Workload(
        model=Network(c, vocabulary=vocabulary),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=c.learning_rate, betas=_BETAS),
        parameter_groups=lambda model: decayed_and_not(model, c.weight_decay),
        schedule=cosine(warmup_steps=c.warmup_steps, min_rate=LEAST * c.learning_rate),
        clip_gradient_norm=CLIP,
        loss=lambda model, batch: _losses(model, batch).mean(),
        train=windows(ids[:border], c.context),
        validation=windows(ids[border:], c.context),
        validation_batch_size=64,
        metrics=measure,
        goals={"bits_per_char": ("<=", 2.3)},
        epochs=c.epochs,
        batch_size=c.batch_size,
        drop_last=True,
        seed=c.seed,
    )


def text(max_chars: int = 0) -> str:
    """All topics in the order of their names, or the beginning of them."""
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    return whole[:max_chars] if max_chars else whole


def encoded(characters: str) -> tuple[Tensor, int]:
    """The text as int64 ids by the order of its characters' code points, and how many different ones there are."""
    vocabulary = sorted(set(characters))
    number = {character: index for index, character in enumerate(vocabulary)}
    return torch.tensor([number[character] for character in characters], dtype=torch.int64), len(vocabulary)


def windows(ids: Tensor, context: int) -> Tensor:
    """(n, context + 1): pieces side by side, each with the character that follows it. A view, not a copy."""
    if len(ids) <= context:
        raise ValueError(
            f"a text of {len(ids)} characters has no window of {context} and the one after: raise "
            "runtime.config.max_chars, or lower runtime.config.context"
        )
    return ids.unfold(0, context + 1, context)


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    """Nats of every character."""
    scores = model(batch[:, :-1])
    return cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")


def measure(model: nn.Module, batch: Batch) -> Sums:
    """Bits per character, and the share of characters that the model would have written itself."""
    scores = model(batch[:, :-1]).flatten(0, 1)
    wanted = batch[:, 1:].flatten()
    nats = float(cross_entropy(scores, wanted, reduction="sum"))
    right = int((scores.argmax(dim=1) == wanted).sum())
    return {"bits_per_char": (nats / math.log(2), len(wanted)), "accuracy": (float(right), len(wanted))}


def decayed_and_not(model: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Two optimizer groups: matrices, and everything with fewer dimensions."""
    parameters = list(model.parameters())
    yield {"name": "decayed", "params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}
    yield {"name": "not decayed", "params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
