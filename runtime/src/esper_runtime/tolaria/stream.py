"""Batches of an IterableDataset, whose position is torchdata's, not two integers.

A stream is read in passes. Its place is the state that a StatefulDataLoader had at some moment, plus the number of
batches taken since; batches read ahead of their step are not among them, so none is lost or given twice. Without
`steps_per_epoch` an epoch is one pass; with it an epoch has so many steps and the stream goes on from pass to pass.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from esper_runtime.tolaria import plainjson, rng
from esper_runtime.tolaria.data import AnyLoader, Position, batch_length, mixed, moved
from esper_runtime.tolaria.prefetch import Meter, Stage
from esper_runtime.tolaria.state import StateMismatchError
from esper_runtime.tolaria.workers import worker_context
from esper_runtime.workload import Batch

MAX_STATE_BYTES = 32 * 1024
"""Of a dataset's own state: it goes into every snapshot's description."""
_BASE_EVERY = 32
"""Batches between two notes of the reader's state while batches are read ahead."""
_RADIX = 1 << 31
"""Steps that an epoch of unknown length may have."""


class Reader:
    """One place in the stream. `next` gives host batches; `place` is what `open` needs to go on after them."""

    def __init__(self, dataset: IterableDataset[Any], *, seed: int, workers: int, options: Mapping[str, Any]) -> None:
        """`options` are those of torch's DataLoader: batch_size, collate_fn, drop_last, pin_memory."""
        self._dataset: Any = dataset
        self._seed = seed
        self._options = {**options, "num_workers": workers}
        self.workers = workers
        self._loader: StatefulDataLoader[Any] | None = None
        self._batches: Iterator[Batch] = iter(())
        self._base: Any = None
        self._since = 0
        self.number = 0
        """Of the pass, from 0."""
        self.finished = False
        """The pass has no more batches."""

    def open(self, number: int, *, base: Any = None, drop: int = 0) -> None:
        """Pass `number` from its beginning, or from `drop` batches after `base`. No random state moves by this."""
        states = rng.capture()
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(number)
        self._loader = self._new_loader(number)
        if base is not None:
            self._loader.load_state_dict(base)
        self.number, self.finished = number, False
        self._batches = iter(self._loader)
        self._note()
        for _ in range(drop):
            next(self)
        rng.restore(states)

    def _new_loader(self, number: int) -> "StatefulDataLoader[Any]":
        with warnings.catch_warnings():  # torchdata 0.11 calls what torch 2.13 has deprecated
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            return StatefulDataLoader(
                self._dataset,
                multiprocessing_context=worker_context() if self.workers else None,
                generator=torch.Generator().manual_seed(mixed(self._seed, number)),
                **self._options,
            )

    def _note(self) -> None:
        assert self._loader is not None
        self._base, self._since = plainjson.encode(self._loader.state_dict()), 0

    def close(self) -> None:
        """Ends the workers. The pass is opened when a batch of it is asked for."""
        self._loader, self._batches, self._base, self._since = None, iter(()), None, 0

    def next_pass(self) -> None:
        self.close()
        self.number, self.finished = self.number + 1, False

    def __next__(self) -> Batch:
        """StopIteration at the end of the pass, again and again until `next_pass`."""
        if self.finished:
            raise StopIteration
        if self._loader is None:
            self.open(self.number)
        if self._since >= _BASE_EVERY:
            self._note()
        try:
            batch = next(self._batches)
        except StopIteration:
            self.finished = True
            raise
        self._since += 1
        return batch

    def place(self, *, ahead: int) -> dict[str, Any]:
        """`ahead` batches were read that nobody has been given."""
        if self._loader is not None and (ahead or not self.finished):
            if not ahead:
                self._note()
            return {"pass": self.number, "base": self._base, "drop": self._since - ahead}
        own = None if self.workers or not hasattr(self._dataset, "state_dict") else self._dataset.state_dict()
        return {"pass": self.number, "finished": self.finished, "dataset": plainjson.encode(own)}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Where `place` was taken."""
        if "base" in place:
            self.open(place["pass"], base=plainjson.decode(place["base"]), drop=place["drop"])
            return
        self.close()
        self.number, self.finished = place["pass"], place["finished"]
        if place["dataset"] is not None:
            self._dataset.load_state_dict(plainjson.decode(place["dataset"]))


class StreamLoader(AnyLoader):
    """Batches of a stream. Its place is the run's extra state "loader"."""

    def __init__(
        self,
        reader: Reader,
        *,
        device: torch.device,
        steps_per_epoch: int | None = None,
        transform: Callable[[Batch], Batch] | None = None,
        accumulation_steps: int = 1,
        stage: Stage | None = None,
        meter: Meter | None = None,
    ) -> None:
        """With a stage, one batch is read ahead and moved while its predecessor is computed."""
        super().__init__(batches_per_epoch=steps_per_epoch or 0, radix=steps_per_epoch or _RADIX)
        self._reader = reader
        self._device = device
        self._steps = steps_per_epoch
        self._transform = transform
        self._group_size = accumulation_steps
        self._stage = stage
        self._meter = meter
        self._staged: Any = None

    def take(self) -> Batch | None:
        epoch, index = self.position
        while self._steps is None or index < self._steps:
            group = self._draw_group()
            if not group:
                if index == 0:
                    raise ValueError(f"the training data gave no batch in epoch {epoch + 1}: each pass must start anew")
                self.batches_per_epoch = index
                break
            here = Position(epoch, index)
            index += 1
            if here not in self.skipped:
                self.current, self.position = here, Position(epoch, index)
                return self._given(group)
        self.position = Position(epoch, index)
        return None

    def _given(self, group: list[Batch]) -> Batch:
        lengths = [batch_length(batch) or 1 for batch in group]
        self.samples = sum(lengths)
        if self._transform is not None:
            group = [self._transform(batch) for batch in group]
        if self._group_size == 1:
            return group[0]
        self.lengths = lengths
        return group

    def next_epoch(self) -> None:
        if self._steps is None:
            self._reader.next_pass()
        super().next_epoch()

    # Reading

    def _draw_group(self) -> list[Batch]:
        """Up to a group; fewer at the end of a pass that ends the epoch."""
        group: list[Batch] = []
        began = time.monotonic()
        while len(group) < self._group_size and (batch := self._draw()) is not None:
            group.append(batch)
        if self._meter is not None:
            self._meter.add((time.monotonic() - began) * 1e3)
        return group

    def _draw(self) -> Batch | None:
        """The next batch, moved to the device."""
        if self._stage is None:
            batch = self._read()
            return None if batch is None else moved(batch, self._device)
        ticket = self._staged if self._staged is not None else self._put()
        self._staged = None
        if ticket is None:
            return None
        batch = self._stage.claim(ticket)
        self._staged = self._put()
        return batch

    def _put(self) -> Any:
        batch = self._read()
        return None if batch is None or self._stage is None else self._stage.put(batch)

    def _read(self) -> Batch | None:
        """The stream's next batch; None at the end of a pass that ends the epoch. ValueError when there is none."""
        batch = next(self._reader, None)
        if batch is None and self._steps is not None:
            self._reader.next_pass()
            batch = next(self._reader, None)
        if batch is None and self.position == (0, 0):
            raise ValueError("the training data gave no batch: give data, or lower batch_size when drop_last is set")
        return batch

    # The extra state

    def capture(self) -> dict[str, Any]:
        """ValueError when the dataset's own state is too large."""
        place = self._reader.place(ahead=0 if self._staged is None else 1)
        size = len(json.dumps(place))
        if size > MAX_STATE_BYTES:
            raise ValueError(
                f"the training dataset's state_dict has {size} bytes as JSON; at most {MAX_STATE_BYTES} fit beside a "
                "snapshot: keep positions and seeds in it, not data"
            )
        return {**place, "length": self.batches_per_epoch, "workers": self._reader.workers}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """StateMismatchError when it is of other data, or of another number of workers."""
        if not saved:
            raise StateMismatchError("this state was saved from data with a length; a stream cannot go on from it")
        if saved["workers"] != self._reader.workers:
            raise StateMismatchError(
                f"this state was saved with Workload.num_workers={saved['workers']}: each has a place of its own "
                f"in the stream; use that number again, not {self._reader.workers}"
            )
        self._staged = None
        self.batches_per_epoch = saved["length"]
        self._reader.go_to(saved)

    def close(self) -> None:
        """Ends the workers."""
        self._reader.close()
