"""A map-style dataset read by worker processes, or ahead of time, with batches that do not depend on either.

Whatever is random in reading a batch is drawn from a seed of its own, made of (seed, epoch, batch). So a batch is a
function of its position: the same for any number of workers, after a resume, and when it is read a second time.
"""

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pickle import PicklingError  # what multiprocessing raises; nothing here pickles
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from esper_runtime.tolaria import rng
from esper_runtime.tolaria.data import Fetch, Loader, Position, mapped, mixed, moved
from esper_runtime.workload import Batch, Data

_PRELOADED = ["torch.utils.data", "torchdata.stateful_dataloader", "esper_runtime.tolaria.data"]


def worker_context() -> BaseContext:
    """How workers are started: by a server that was started afresh and has torch imported, so that they are there soon.

    Never by fork of this process, whose gRPC channels and pinned buffers a child must not inherit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


class Seeded(Dataset[tuple[Position, Batch]]):
    """A dataset whose items are whole batches. Lives in the workers, or here."""

    def __init__(self, data: Data, *, seed: int, collate: Callable[[list[Any]], Batch] | None) -> None:
        self._data = data
        self._seed = seed
        self._collate = collate or default_collate

    def __getitem__(self, request: tuple[Position, list[int]]) -> tuple[Position, Batch]:
        key, indices = request
        rng.seed_everything(mixed(self._seed, key.epoch, key.batch))
        return key, self._collate([self._data[index] for index in indices])


class Requests(Sampler[tuple[Position, list[int]]]):
    """What the workers are asked for: all batches of the training, from `begin` on."""

    def __init__(self, loader: Loader, *, epochs: int) -> None:
        self._loader = loader
        self._epochs = epochs
        self.begin = Position(0, 0)

    def __iter__(self) -> Iterator[tuple[Position, list[int]]]:
        for key in self._loader.upcoming(*self.begin, epochs=self._epochs):
            yield key, self._loader.indices(*key).tolist()


class Workers:
    """Reads batches in worker processes, which stay for the whole training and work across epochs' ends."""

    def __init__(
        self, loader: Loader, dataset: Seeded, *, epochs: int, workers: int, pin_memory: bool, device: torch.device
    ) -> None:
        """`device` is where batches go; the CPU leaves the move to somebody else."""
        self._device = device
        self._requests = Requests(loader, epochs=epochs)
        self._batches = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            multiprocessing_context=worker_context(),
            persistent_workers=True,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
        )
        self._iterator: Iterator[tuple[Position, Batch]] | None = None

    def __call__(self, epoch: int, number: int) -> Batch:
        key = Position(epoch, number)
        given, batch = next(self._iterator, (None, None)) if self._iterator is not None else (None, None)
        if given != key:  # the first one, or training has jumped
            given, batch = self._jump(key)
        assert given == key, f"workers gave {given}, not {key}"
        return moved(batch, self._device)

    def _jump(self, key: Position) -> tuple[Position, Batch]:
        self._requests.begin = key
        try:
            with warnings.catch_warnings():  # torch advises to fork then
                warnings.filterwarnings("ignore", message="Got pickle error")
                self._iterator = iter(self._batches)
        except (AttributeError, TypeError, PicklingError) as error:
            raise TypeError(
                "Workload.num_workers: the training dataset and collate must be importable by a new process "
                f"(no lambda, no local class or function): {error}"
            ) from error
        first: tuple[Position, Batch] = next(self._iterator)
        return first


def reproducible(loader: Loader, dataset: Seeded, *, pin_memory: bool) -> Fetch:
    """Reads host batches in this process, leaving its random states as they were: for reading ahead."""

    def read(epoch: int, number: int) -> Batch:
        states = rng.capture()
        try:
            _, batch = dataset[Position(epoch, number), loader.indices(epoch, number).tolist()]
        finally:
            rng.restore(states)
        return mapped(batch, torch.Tensor.pin_memory) if pin_memory else batch

    return read


def _as_it_is(batch: Any) -> Any:
    return batch
