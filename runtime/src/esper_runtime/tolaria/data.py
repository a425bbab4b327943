"""Batches in a deterministic order, from any position.

The order of an epoch is a pure function of (seed, epoch), so a position is two integers and a resume needs nothing
else. Batches found poisonous are skipped for good.
"""

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

    def __init__(self, data: Data, device: torch.device) -> None:
        self._device = device
        self._data = _to(data, device) if _is_tensors(data) else data
        self._tensors = _is_tensors(data)
        self.size = _length(data)

    def batch(self, indices: Tensor) -> Batch:
        if self._tensors:
            return _map(self._data, lambda tensor: tensor.index_select(0, indices.to(tensor.device)))
        samples = [self._data[index] for index in indices.tolist()]
        return _to(default_collate(samples), self._device)


class Loader:
    """Training batches with a movable position."""

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
    ) -> None:
        self._source = Source(data, device)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._transform = transform
        whole, rest = divmod(self._source.size, batch_size)
        self.batches_per_epoch = whole + (1 if rest and not drop_last else 0)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"the training data has {self._source.size} samples, not one batch of {batch_size}: "
                "lower batch_size, or give data"
            )
        self.position = Position(0, 0)
        self.current = Position(0, 0)
        """Of the batch given last."""
        self.samples = 0
        """In the batch given last."""
        self.skipped: set[Position] = set()
        self._order: tuple[int, Tensor] | None = None

    def take(self) -> Batch | None:
        """The next batch that is not skipped; None at the end of the epoch."""
        epoch, index = self.position
        while Position(epoch, index) in self.skipped:
            index += 1
        if index >= self.batches_per_epoch:
            self.position = Position(epoch, index)
            return None
        self.current = Position(epoch, index)
        self.position = Position(epoch, index + 1)
        start = index * self._batch_size
        self.samples = min(self._batch_size, self._source.size - start)
        batch = self._source.batch(self._epoch_order(epoch)[start : start + self._batch_size])
        return batch if self._transform is None else self._transform(batch)

    def next_epoch(self) -> None:
        self.position = Position(self.position.epoch + 1, 0)

    def remaining(self, epochs: int) -> int:
        """Batches that are still to come in a training of so many epochs; skipped ones are none."""
        end = epochs * self.batches_per_epoch
        begin = self.number(self.position)
        skipped = sum(1 for position in self.skipped if begin <= self.number(position) < end)
        return max(0, end - begin) - skipped

    def number(self, position: Position) -> int:
        """A position as one integer, for the run's log; `position_of` turns it back."""
        return position.epoch * self.batches_per_epoch + position.batch

    def position_of(self, number: int) -> Position:
        return Position(*divmod(number, self.batches_per_epoch))

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._permutation(epoch))
        return self._order[1]

    def _permutation(self, epoch: int) -> Tensor:
        if not self._shuffle:
            return torch.arange(self._source.size)
        generator = torch.Generator().manual_seed((self._seed * _MIX + epoch) & _SEED_MASK)
        return torch.randperm(self._source.size, generator=generator)


def in_order(data: Data, *, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """All batches of held-out data, in its own order."""
    source = Source(data, device)
    for start in range(0, source.size, batch_size):
        yield source.batch(torch.arange(start, min(start + batch_size, source.size)))


def batch_length(batch: Batch) -> int:
    """Samples in a batch: the length of its first tensor. 0 when it has none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts: Any = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((length for part in parts if (length := batch_length(part))), 0)


def _is_tensors(data: Data) -> bool:
    if isinstance(data, Mapping):
        return all(isinstance(value, Tensor) for value in data.values())
    if isinstance(data, (tuple, list)):
        return bool(data) and all(isinstance(value, Tensor) for value in data)
    return isinstance(data, Tensor)


def _length(data: Data) -> int:
    if not _is_tensors(data):
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise TypeError(f"data of type {type(data).__name__} has no length or index: give tensors or a dataset")
        return len(data)
    tensors = list(data.values()) if isinstance(data, Mapping) else [data] if isinstance(data, Tensor) else list(data)
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1:
        raise ValueError(f"in-memory tensors have lengths {sorted(lengths)}: give tensors of equal length")
    return lengths.pop()


def _map(data: Data, change: Callable[[Tensor], Tensor]) -> Data:
    if isinstance(data, Tensor):
        return change(data)
    if isinstance(data, Mapping):
        return {key: _map(value, change) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(_map(value, change) for value in data))
    if isinstance(data, (tuple, list)):
        return type(data)(_map(value, change) for value in data)
    return data


def _to(data: Data, device: torch.device) -> Data:
    return _map(data, lambda tensor: tensor.to(device))
