"""Batches in a deterministic order, from any position.

The order of an epoch is a pure function of (seed, epoch), so a position is two integers and a resume needs nothing
else. Batches found poisonous are skipped for good. With gradient accumulation the unit is a step: a position counts
groups of batches, and a group is given, skipped and replayed as a whole. Streams are in stream.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from esper_runtime.workload import Batch, Data

_MIX = 0x9E3779B97F4A7C15
_SEED_MASK = (1 << 63) - 1


class Position(NamedTuple):
    """The next batch to give."""

    epoch: int
    batch: int


class Source:
    """Uniform access to in-memory tensors and map-style datasets."""

    def __init__(
        self, data: Data, device: torch.device, *, collate: Callable[[list[Any]], Batch] | None = None
    ) -> None:
        self._device = device
        self.in_memory = is_tensors(data)
        self._data = moved(data, device) if self.in_memory else data
        self._collate = collate or default_collate
        self.size = _length(data)

    def batch(self, indices: Tensor) -> Batch:
        if self.in_memory:
            return mapped(self._data, lambda tensor: tensor.index_select(0, indices.to(tensor.device)))
        return moved(self._collate([self._data[index] for index in indices.tolist()]), self._device)


Fetch = Callable[[int, int], Batch]
"""(epoch, batch of the epoch) -> the batch, on the training device, before `transform`."""


class AnyLoader(ABC):
    """Training batches with a movable position. The position is the next step's batch, or group of batches."""

    def __init__(self, *, batches_per_epoch: int, radix: int) -> None:
        self.batches_per_epoch = batches_per_epoch
        """Steps of an epoch, skipped ones included; 0 while unknown."""
        self._radix = radix
        self.position = Position(0, 0)
        self.current = Position(0, 0)
        """Of the batch given last."""
        self.samples = 0
        """In the batch or group given last."""
        self.lengths: list[int] = []
        """Samples in each batch of the group given last; empty without accumulation."""
        self.skipped: set[Position] = set()
        self.left_out: set[Position] = set()
        """Of batches that are given and evaluated, but whose steps are not to be applied."""

    @abstractmethod
    def take(self) -> Batch | None:
        """The next batch that is not skipped, or a list of batches with accumulation; None at the end of the epoch."""

    def next_epoch(self) -> None:
        self.position = Position(self.position.epoch + 1, 0)

    def remaining(self, epochs: int) -> int:
        """Batches that are still to come in a training of so many epochs; skipped ones are none."""
        end = epochs * self.batches_per_epoch
        begin = self.position.epoch * self.batches_per_epoch + self.position.batch
        skipped = sum(1 for position in self.skipped if self.position <= position and position.epoch < epochs)
        return max(0, end - begin - skipped)

    def number(self, position: Position) -> int:
        """A position as one integer, for the run's log; `position_of` turns it back."""
        return position.epoch * self._radix + position.batch

    def position_of(self, number: int) -> Position:
        return Position(*divmod(number, self._radix))


class Loader(AnyLoader):
    """In-memory tensors, or a map-style dataset read in this process unless `fetch` is replaced."""

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        shuffle: bool = True,
        drop_last: bool = False,
        transform: Callable[[Batch], Batch] | None = None,
        collate: Callable[[list[Any]], Batch] | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        self.source = Source(data, device, collate=collate)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._transform = transform
        self._group_size = accumulation_steps
        whole, rest = divmod(self.source.size, batch_size)
        self._batches = whole + (1 if rest and not drop_last else 0)
        if self._batches == 0:
            raise ValueError(
                f"the training data has {self.source.size} samples, not one batch of {batch_size}: "
                "lower batch_size, or give data"
            )
        steps = -(-self._batches // accumulation_steps)
        super().__init__(batches_per_epoch=steps, radix=steps)
        self._order: tuple[int, Tensor] | None = None
        self.fetch: Fetch = self._read
        """How a batch is read."""
        self._give = self._one if accumulation_steps == 1 else self._group

    def take(self) -> Batch | None:
        epoch, index = self.position
        while Position(epoch, index) in self.skipped:
            index += 1
        if index >= self.batches_per_epoch:
            self.position = Position(epoch, index)
            return None
        self.current = Position(epoch, index)
        self.position = Position(epoch, index + 1)
        return self._give(epoch, index)

    def _one(self, epoch: int, index: int) -> Batch:
        self.samples = min(self._batch_size, self.source.size - index * self._batch_size)
        batch = self.fetch(epoch, index)
        return batch if self._transform is None else self._transform(batch)

    def _group(self, epoch: int, index: int) -> list[Batch]:
        batches, lengths = [], []
        for number in self._numbers(index):
            batches.append(self._one(epoch, number))
            lengths.append(self.samples)
        self.lengths, self.samples = lengths, sum(lengths)
        return batches

    def _numbers(self, step: int) -> range:
        """Batches of a step of the epoch."""
        return range(step * self._group_size, min((step + 1) * self._group_size, self._batches))

    def _read(self, epoch: int, number: int) -> Batch:
        return self.source.batch(self.indices(epoch, number))

    def indices(self, epoch: int, number: int) -> Tensor:
        """Of the samples of one batch."""
        start = number * self._batch_size
        return self._epoch_order(epoch)[start : start + self._batch_size]

    def upcoming(self, epoch: int, number: int, *, epochs: int) -> Iterator[Position]:
        """Single batches in the order in which they will be asked for, from the step that this one is part of."""
        step = number // self._group_size
        while epoch < epochs:
            for index in range(step, self.batches_per_epoch):
                if Position(epoch, index) not in self.skipped:
                    yield from (Position(epoch, each) for each in self._numbers(index))
            epoch, step = epoch + 1, 0

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._permutation(epoch))
        return self._order[1]

    def _permutation(self, epoch: int) -> Tensor:
        if not self._shuffle:
            return torch.arange(self.source.size)
        return torch.randperm(self.source.size, generator=torch.Generator().manual_seed(mixed(self._seed, epoch)))


def mixed(seed: int, *numbers: int) -> int:
    """A seed of its own for each tuple of numbers."""
    for number in numbers:
        seed = (seed * _MIX + number) & _SEED_MASK
    return seed


def in_order(
    data: Data, *, batch_size: int, device: torch.device, collate: Callable[[list[Any]], Batch] | None = None
) -> Iterator[Batch]:
    """All batches of held-out data, in its own order."""
    source = Source(data, device, collate=collate)
    for start in range(0, source.size, batch_size):
        yield source.batch(torch.arange(start, min(start + batch_size, source.size)))


def batch_length(batch: Batch) -> int:
    """Samples in a batch: the length of its first tensor. 0 when it has none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts: Any = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((length for part in parts if (length := batch_length(part))), 0)


def is_tensors(data: Data) -> bool:
    """Whether this is in-memory data, rather than a dataset."""
    if isinstance(data, Mapping):
        return all(isinstance(value, Tensor) for value in data.values())
    if isinstance(data, (tuple, list)):
        return bool(data) and all(isinstance(value, Tensor) for value in data)
    return isinstance(data, Tensor)


def _length(data: Data) -> int:
    if not is_tensors(data):
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise TypeError(f"data of type {type(data).__name__} has no length or index: give tensors or a dataset")
        return len(data)
    tensors = list(data.values()) if isinstance(data, Mapping) else [data] if isinstance(data, Tensor) else list(data)
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1:
        raise ValueError(f"in-memory tensors have lengths {sorted(lengths)}: give tensors of equal length")
    return lengths.pop()


def mapped(data: Data, change: Callable[[Tensor], Tensor]) -> Data:
    """The same structure with every tensor changed."""
    if isinstance(data, Tensor):
        return change(data)
    if isinstance(data, Mapping):
        return {key: mapped(value, change) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(mapped(value, change) for value in data))
    if isinstance(data, (tuple, list)):
        return type(data)(mapped(value, change) for value in data)
    return data


def tensors_in(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch, in the order of its structure."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(batch, note)
    return found


def moved(data: Data, device: torch.device, *, non_blocking: bool = False) -> Data:
    """The same structure on `device`."""
    return mapped(data, lambda tensor: tensor.to(device, non_blocking=non_blocking))
