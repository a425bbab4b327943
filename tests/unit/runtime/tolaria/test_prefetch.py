import pytest
import torch
from esper_runtime.tolaria.data import Loader, Position
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.prefetch import METER_EVERY, Ahead, Timed

EPOCHS = 3


class Buffers:
    """A stage with two places, as a GPU has: a third batch on its way would overwrite one that is in use."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.log: list[str] = []

    def put(self, batch: torch.Tensor) -> torch.Tensor:
        self.waiting.append(id(batch))
        assert len(self.waiting) == 1, "two batches on their way"
        self.log.append(f"put {batch[0].item()}")
        return batch

    def claim(self, ticket: torch.Tensor) -> torch.Tensor:
        self.waiting.remove(id(ticket))
        self.log.append(f"claim {ticket[0].item()}")
        return ticket


def loader(*, accumulation_steps: int = 1) -> Loader:
    return Loader(
        torch.arange(10), batch_size=2, seed=1, device=torch.device("cpu"), accumulation_steps=accumulation_steps
    )


def ahead(one: Loader) -> Buffers:
    """Makes the loader read ahead; only the buffers of `dropping` may lose a batch."""
    stage = Buffers()
    one.fetch = Ahead(one.fetch, stage, upcoming=lambda e, n: one.upcoming(e, n, epochs=EPOCHS))
    return stage


def rest(one: Loader, *, until: int = EPOCHS) -> list[object]:
    """All batches up to an epoch, as lists."""
    found: list[object] = []
    while one.position.epoch < until:
        batch = one.take()
        if batch is None:
            one.next_epoch()
        else:
            found.append([each.tolist() for each in batch] if isinstance(batch, list) else batch.tolist())
    return found


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_same_batches_as_without(accumulation_steps):
    one, plain = (loader(accumulation_steps=accumulation_steps) for _ in range(2))
    ahead(one)
    assert rest(one) == rest(plain)


@pytest.mark.row("T40")
def test_the_next_batch_is_on_its_way_before_this_one_is_used():
    one = Loader(torch.arange(3), batch_size=1, seed=0, device=torch.device("cpu"), shuffle=False)
    stage = Buffers()
    one.fetch = Ahead(one.fetch, stage, upcoming=lambda e, n: one.upcoming(e, n, epochs=1))
    for _ in range(3):
        one.take()
        stage.log.append("step")
    assert stage.log == [
        *("put 0", "claim 0", "put 1", "step"),
        *("claim 1", "put 2", "step"),
        *("claim 2", "step"),
    ]


@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
@pytest.mark.parametrize("taken", [1, 2])
def test_a_staged_batch_is_neither_lost_nor_repeated_by_a_jump(accumulation_steps, taken):
    one, plain = (loader(accumulation_steps=accumulation_steps) for _ in range(2))
    stage = ahead(one)
    expected = rest(plain)
    for _ in range(taken):
        one.take()
    stage.waiting.clear()  # what waits now is dropped by the jump
    one.position = Position(0, 0)
    assert rest(one) == expected


def test_a_staged_batch_that_is_skipped_is_not_given():
    one, plain = loader(), loader()
    stage = ahead(one)
    one.take(), plain.take()
    stage.waiting.clear()
    for each in (one, plain):
        each.skipped.add(Position(0, 1))
    assert rest(one) == rest(plain)


def test_waiting_is_measured():
    metrics = Metrics(None)
    times = iter(range(0, 100_000_000, 2_000_000))
    timed = Timed(lambda epoch, number: number, metrics, monotonic_ns=lambda: next(times))
    for number in range(METER_EVERY - 1):
        timed(0, number)
    assert metrics.value("tolaria.train.input_wait_ms") is None
    timed(0, 0)
    assert metrics.value("tolaria.train.input_wait_ms") == 2.0
