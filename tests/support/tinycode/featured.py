"""A tiny workload with every kind of data and every feature of PyTorch that Tolaria knows, chosen by its config."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from esper_runtime.workload import Batch, Workload, accuracy, read_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, IterableDataset, get_worker_info

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=5e-2, momentum=0.9),
    "per-tensor": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.5, max_iter=3),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    data: str = "memory"
    """memory, map, stream (with a state of its own) or plainstream (without)."""
    samples: int = 70
    epochs: int = 2
    batch_size: int = 4
    workers: int = 0
    noisy: bool = False
    """Reading a sample draws random numbers."""
    accumulation_steps: int = 1
    steps_per_epoch: int | None = None
    precision: str = "float32"
    compile: str = "off"
    cuda_graphs: bool = False
    optimizer: str = "adamw"
    clip: float | None = None
    losses: str = ""
    """File for the losses, one hexadecimal float per training batch."""
    read: str = ""
    """File for the number of the first sample of each training batch."""
    seed: int = 3


def sample(index: int, *, noisy: bool) -> tuple[Tensor, int, int]:
    """(input, label, index)."""
    inputs = torch.randn(8, generator=torch.Generator().manual_seed(index))
    label = int(inputs[0] > 0) + 2 * int(inputs[1] > 0)
    if noisy:
        inputs = inputs + 0.1 * torch.randn(8) + 0.01 * random.random()
    return inputs, label, index


class Samples(Dataset[tuple[Tensor, int, int]]):
    def __init__(self, size: int, *, noisy: bool) -> None:
        self.size, self.noisy = size, noisy

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return sample(index, noisy=self.noisy)


class PlainStream(IterableDataset[tuple[Tensor, int, int]]):
    """Each worker has its share. Every pass has another order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.number = 0

    def set_epoch(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        worker = get_worker_info()
        first, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.number)).tolist()
        for index in order[first::count]:
            yield sample(index, noisy=False)


class Stream(PlainStream):
    """The same with a state, so that nothing is read again to get back to a place."""

    def __iter__(self) -> "Cursor":
        return Cursor(super().__iter__())


class Cursor:
    def __init__(self, samples: Iterator[tuple[Tensor, int, int]]) -> None:
        self.samples = [index for _, _, index in samples]
        self.place = 0

    def __iter__(self) -> "Cursor":
        return self

    def __next__(self) -> tuple[Tensor, int, int]:
        if self.place == len(self.samples):
            raise StopIteration
        self.place += 1
        return sample(self.samples[self.place - 1], noisy=False)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "as bytes": bytes([self.place % 256]), "as tensor": torch.tensor(self.place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["as bytes"][0] == state["place"] % 256 == int(state["as tensor"]) % 256
        self.place = state["place"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 33)
        self.norm = nn.BatchNorm1d(33)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(33, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.drop(torch.relu(self.norm(self.first(inputs)))))


def data_of(c: Config) -> Any:
    if c.data == "memory":
        return torch.utils.data.default_collate([sample(index, noisy=False) for index in range(c.samples)])
    kinds = {"stream": Stream, "plainstream": PlainStream}
    return kinds[c.data](c.samples) if c.data in kinds else Samples(c.samples, noisy=c.noisy)


def build(config: Mapping[str, Any]) -> Workload:
    c = read_config(Config, config)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = cross_entropy(model(batch[0]), batch[1])
        if c.losses and model.training:
            note(c.losses, value.item().hex())
            note(c.read, str(int(batch[2][0])))
        return value

    def pure_loss(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    train = data_of(c)
    return Workload(
        model=Net(),
        optimizer=OPTIMIZERS[c.optimizer],
        loss=loss if c.compile == "off" else pure_loss,
        train=list(train) if isinstance(train, tuple) else train,
        validation=torch.utils.data.default_collate([sample(index, noisy=False) for index in range(100, 120)]),
        metrics=lambda model, batch: accuracy(model, batch[:2]),
        epochs=c.epochs,
        batch_size=c.batch_size,
        accumulation_steps=c.accumulation_steps,
        steps_per_epoch=c.steps_per_epoch,
        precision=c.precision,  # type: ignore[arg-type]
        compile=c.compile,
        cuda_graphs=c.cuda_graphs,
        clip_gradient_norm=c.clip,
        num_workers=c.workers,
        seed=c.seed,
        threads=1,
    )


def note(file: str, line: str) -> None:
    if file:
        with open(file, "a", encoding="ascii") as opened:
            opened.write(f"{line}\n")
