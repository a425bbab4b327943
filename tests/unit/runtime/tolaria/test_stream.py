import json
import sys
from itertools import chain
from typing import Any

import pytest
import torch
from esper_runtime.tolaria.data import Position
from esper_runtime.tolaria.state import StateMismatchError
from esper_runtime.tolaria.stream import MAX_STATE_BYTES, Reader, StreamLoader

from tests.support.trainers import CODE

sys.path.insert(0, str(CODE))
featured = pytest.importorskip("featured")

CPU = torch.device("cpu")
EPOCHS = 3


class Still:
    """A stage without a device: what is read ahead waits as it is."""

    def put(self, batch):
        return batch

    def claim(self, ticket):
        return ticket


def loader(
    kind: Any = None, *, size: int = 20, workers: int = 0, stage: Any = None, drop_last: bool = False, **options: Any
) -> StreamLoader:
    dataset = (kind or featured.Stream)(size)
    reading = {"batch_size": 3, "collate_fn": None, "drop_last": drop_last, "pin_memory": False}
    return StreamLoader(Reader(dataset, seed=1, workers=workers, options=reading), device=CPU, stage=stage, **options)


def rest(one: StreamLoader, *, until: int = EPOCHS) -> list[list[int]]:
    """Sample numbers of every step that is left, an empty list where an epoch ends."""
    found: list[list[int]] = []
    while one.position.epoch < until:
        step = one.take()
        if step is None:
            one.next_epoch()
            found.append([])
        else:
            batches = step if isinstance(step, list) and isinstance(step[0], list) else [step]
            found.append([index for batch in batches for index in batch[2].tolist()])
    return found


def saved(one: StreamLoader) -> tuple[Position, Any]:
    """Position and extra state as a snapshot has them."""
    return one.position, json.loads(json.dumps(one.capture(), allow_nan=False))


def go_back(one: StreamLoader, state: tuple[Position, Any]) -> None:
    one.restore(state[1])
    one.position = state[0]


CASES = {
    "stateful": {},
    "without a state": {"kind": featured.PlainStream},
    "in groups": {"accumulation_steps": 2},
    "read ahead": {"stage": Still()},
    "read ahead in groups": {"stage": Still(), "accumulation_steps": 3},
    "fixed epochs": {"steps_per_epoch": 5},
    "fixed epochs, ahead": {"steps_per_epoch": 5, "stage": Still(), "kind": featured.PlainStream},
    "whole batches": {"drop_last": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_place_gives_the_same_rest_again_here_and_elsewhere(case):
    whole = rest(loader(**case))
    one = loader(**case)
    places = [(saved(one), 0)]
    entries = 0
    while one.position.epoch < EPOCHS:
        if one.take() is None:
            places.append((saved(one), entries))  # an epoch's end is a place as well
            one.next_epoch()
        entries += 1
        places.append((saved(one), entries))
    assert entries == len(whole)
    for state, given in reversed(places):
        go_back(one, state)
        other = loader(**case)
        go_back(other, state)
        assert rest(one) == rest(other) == whole[given:]


@pytest.mark.parametrize("kind", [featured.Stream, featured.PlainStream])
def test_workers_lose_and_repeat_nothing(kind):
    whole = rest(loader(kind, workers=2), until=2)
    first_epoch = whole[: whole.index([])]
    assert sorted(index for step in first_epoch for index in step) == list(range(20))
    one = loader(kind, workers=2)
    for _ in range(3):
        one.take()
    state = saved(one)
    assert rest(one, until=2) == whole[3:]
    go_back(one, state)
    assert rest(one, until=1) == whole[3 : len(first_epoch) + 1]


def test_an_epoch_is_one_pass_and_its_length_is_known_after_it():
    one = loader(size=8)
    assert one.batches_per_epoch == one.remaining(2) == 0
    assert [len(step) for step in rest(one, until=1)] == [3, 3, 2, 0]
    assert one.batches_per_epoch == 3
    assert one.remaining(3) == 6


def test_fixed_epochs_go_on_from_pass_to_pass():
    one = loader(featured.PlainStream, size=8, steps_per_epoch=2)
    steps = [step for step in rest(one) if step]
    assert [len(step) for step in steps] == [3, 3, 2, 3, 3, 2]
    assert sorted(chain.from_iterable(steps[:3])) == list(range(8))
    assert one.batches_per_epoch == 2


def test_skipped_steps_are_left_out_and_nothing_else_moves():
    whole = rest(loader())
    one = loader()
    one.skipped.add(Position(0, 2))
    assert rest(one) == [*whole[:2], *whole[3:]]


def test_samples_are_counted_and_transformed():
    one = loader(size=8, accumulation_steps=2, transform=lambda batch: [batch[0] * 0, *batch[1:]])
    one.take()
    assert (one.samples, one.lengths) == (6, [3, 3])
    (group,) = [one.take()]
    assert (one.samples, one.lengths) == (2, [2])
    assert not group[0][0].any()


class Drawing(featured.PlainStream):
    """Draws from the random state of training whenever a sample is read."""

    def __iter__(self):
        for sample in super().__iter__():
            torch.rand(1)
            yield sample


def test_getting_back_to_a_place_moves_no_random_state():
    """Though the samples before it are read again."""
    one = loader(Drawing)
    torch.manual_seed(0)
    for _ in range(5):
        one.take()
    before = torch.get_rng_state()
    go_back(one, saved(one))
    assert torch.equal(torch.get_rng_state(), before)
    one.take()
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_stream_without_batches_is_an_error():
    with pytest.raises(ValueError, match="gave no batch"):
        loader(size=0).take()
    with pytest.raises(ValueError, match="gave no batch"):
        loader(size=2, drop_last=True, steps_per_epoch=3).take()


def test_a_dataset_that_keeps_data_in_its_state_is_refused():
    class Hoarder(featured.PlainStream):
        def state_dict(self):
            return {"buffer": bytes(MAX_STATE_BYTES)}

        def load_state_dict(self, state):
            return

    one = loader(Hoarder)
    one.take()
    with pytest.raises(ValueError, match="keep positions and seeds in it, not data"):
        one.capture()


def test_a_state_of_other_data_or_workers_is_refused():
    with pytest.raises(StateMismatchError, match="cannot go on"):
        loader().restore({})
    with pytest.raises(StateMismatchError, match="num_workers=0"):
        loader(workers=2).restore(loader().capture())
