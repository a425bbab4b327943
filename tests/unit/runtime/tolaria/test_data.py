from itertools import chain

import pytest
import torch
from esper_runtime.tolaria.data import Loader, Position, batch_length, in_order
from torch.utils.data import TensorDataset

CPU = torch.device("cpu")


def loader(size: int = 10, batch_size: int = 4, **options: object) -> Loader:
    return Loader(torch.arange(size), batch_size=batch_size, seed=1, device=CPU, **options)  # type: ignore[arg-type]


def epoch(loader: Loader) -> list[list[int]]:
    batches = []
    while (batch := loader.take()) is not None:
        batches.append(batch.tolist())
    loader.next_epoch()
    return batches


def test_epoch_gives_every_sample_once_in_another_order_each_time():
    one = loader()
    first, second = epoch(one), epoch(one)
    assert sorted(chain.from_iterable(first)) == sorted(chain.from_iterable(second)) == list(range(10))
    assert first != second
    assert [len(batch) for batch in first] == [4, 4, 2]


def test_any_position_gives_the_same_batches_again():
    one, other = loader(), loader()
    expected = [epoch(one) for _ in range(3)]
    other.position = Position(2, 1)
    assert epoch(other) == expected[2][1:]


def test_skipped_batches_are_left_out_and_nothing_else_moves():
    one, other = loader(), loader()
    expected = epoch(one)
    other.skipped.add(Position(0, 1))
    assert epoch(other) == [expected[0], expected[2]]


def test_skipping_the_last_batch_ends_the_epoch():
    one = loader()
    one.skipped.update({Position(0, 1), Position(0, 2)})
    assert len(epoch(one)) == 1
    assert one.position == Position(1, 0)


def test_remaining_is_what_will_be_given():
    one = loader()
    one.skipped.update({Position(0, 1), Position(2, 0), Position(2, 2), Position(7, 0)})
    for _ in range(3):
        left = one.remaining(3)
        while one.take() is not None:
            left -= 1
            assert one.remaining(3) == left
        one.next_epoch()
    assert one.remaining(3) == one.remaining(1) == 0


def test_current_is_the_position_of_the_batch_given_last():
    one = loader()
    one.take()
    assert (one.current, one.position) == (Position(0, 0), Position(0, 1))


def test_positions_as_numbers():
    one = loader()
    assert all(one.position_of(one.number(Position(e, b))) == Position(e, b) for e in range(3) for b in range(3))


def test_structures_and_datasets():
    pairs = {"x": torch.arange(6.0), "y": torch.arange(6)}
    batch = Loader(pairs, batch_size=3, seed=0, device=CPU, shuffle=False).take()
    assert batch["y"].tolist() == [0, 1, 2]
    dataset = TensorDataset(torch.arange(6.0), torch.arange(6))
    inputs, labels = Loader(dataset, batch_size=4, seed=0, device=CPU, shuffle=False).take()
    assert labels.tolist() == [0, 1, 2, 3]
    assert inputs.dtype == torch.float32


def test_transform_and_drop_last():
    one = loader(drop_last=True, shuffle=False, transform=lambda batch: batch * 10)
    assert epoch(one) == [[0, 10, 20, 30], [40, 50, 60, 70]]


def test_held_out_data_comes_in_its_own_order():
    assert [batch.tolist() for batch in in_order(torch.arange(5), batch_size=2, device=CPU)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ((torch.zeros(3), torch.zeros(4)), ValueError, "equal length"),
        (iter([1, 2]), TypeError, "give tensors or a dataset"),
        (torch.zeros(0, 2), ValueError, "not one batch"),
    ],
)
def test_bad_data_is_refused(data: object, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        Loader(data, batch_size=2, seed=0, device=CPU)


def test_length_of_a_batch_is_that_of_its_first_tensor():
    assert batch_length({"x": torch.zeros(3, 2), "y": torch.zeros(3)}) == 3
    assert batch_length((torch.zeros(2), None)) == 2
    assert batch_length("nothing") == 0
