import sys

import pytest
import torch
from esper_runtime.tolaria.data import Loader, Position
from esper_runtime.tolaria.prefetch import Ahead
from esper_runtime.tolaria.workers import Seeded, Workers, reproducible, worker_context

from tests.support.trainers import CODE

sys.path.insert(0, str(CODE))
featured = pytest.importorskip("featured")

CPU = torch.device("cpu")
EPOCHS = 2


def loader(data: object) -> Loader:
    return Loader(data, batch_size=3, seed=5, device=CPU, accumulation_steps=2)


def seeded(data: object) -> Seeded:
    return Seeded(data, seed=5, collate=torch.utils.data.default_collate)


def rest(one: Loader) -> list[list[float]]:
    """Every number of every batch that is left, group by group."""
    found = []
    while one.position.epoch < EPOCHS:
        group = one.take()
        if group is None:
            one.next_epoch()
        else:
            found.append([value for batch in group for value in (*batch[0].flatten().tolist(), *batch[2].tolist())])
    return found


def test_noisy_batches_are_functions_of_their_position():
    """The same with two workers, without, and read again after a jump; the order is that of the plain loader."""
    data = featured.Samples(19, noisy=True)
    here, away = loader(data), loader(data)
    torch.manual_seed(1)
    here.fetch = reproducible(here, seeded(data), pin_memory=False)
    before = torch.get_rng_state()
    expected = rest(here)
    assert torch.equal(torch.get_rng_state(), before), "reading moved the random state of training"
    workers = away.fetch = Workers(away, seeded(data), epochs=EPOCHS, workers=2, pin_memory=False, device=CPU)
    assert rest(away) == expected
    pids = [worker.pid for worker in workers._iterator._workers]

    away.position = Position(0, 2)
    assert rest(away) == expected[2:]
    assert [worker.pid for worker in workers._iterator._workers] == pids, "workers stay over a jump"

    away.position = Position(0, 0)
    away.take()
    away.skipped.add(Position(1, 1))
    away.position = Position(0, 0)
    steps = away.batches_per_epoch
    assert rest(away) == [*expected[: steps + 1], *expected[steps + 2 :]]

    plain = Loader(featured.Samples(19, noisy=False), batch_size=3, seed=5, device=CPU, accumulation_steps=2)
    indices = [batch[2].tolist() for batch in plain.take() or ()]
    away.position = Position(0, 0)
    assert [batch[2].tolist() for batch in away.take() or ()] == indices


def test_workers_are_never_forked():
    assert worker_context().get_start_method() == "forkserver"


def test_what_cannot_be_sent_to_a_worker_is_explained():
    class Local(featured.Samples):
        pass

    one = loader(Local(9, noisy=False))
    one.fetch = Workers(one, seeded(Local(9, noisy=False)), epochs=1, workers=1, pin_memory=False, device=CPU)
    with pytest.raises(TypeError, match=r"num_workers.*importable.*no local class"):
        one.take()


def test_reading_ahead_gives_noisy_batches_of_their_position_too():
    data = featured.Samples(19, noisy=True)
    one, plain = loader(data), loader(data)
    for each in (one, plain):
        each.fetch = reproducible(each, seeded(data), pin_memory=False)
    one.fetch = Ahead(one.fetch, Still(), upcoming=lambda e, n: one.upcoming(e, n, epochs=EPOCHS))
    assert rest(one) == rest(plain)


class Still:
    def put(self, batch):
        return batch

    def claim(self, ticket):
        return ticket
