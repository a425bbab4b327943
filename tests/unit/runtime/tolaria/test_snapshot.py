import errno
import os
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from esper_runtime.tolaria import slot as slots_module
from esper_runtime.tolaria.snapshot import RESERVE_SHARE, SnapshotError, Snapshots
from torch import Tensor

MIB = 2**20
Volume = namedtuple("Volume", "f_frsize f_blocks f_bavail")


@pytest.fixture(autouse=True, params=[0, 2**60], ids=["two threads", "one thread"])
def worth_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large states are hashed in another thread; here all are, or none."""
    monkeypatch.setattr(slots_module, "WORTH_BYTES", request.param)


def open_slots(directory: Path, identity: str = "run/1/layout", *, slots: int = 3, max_bytes: int = 0) -> Snapshots:
    return Snapshots(directory, identity=identity, slots=slots, max_bytes=max_bytes)


def state(value: float, size: int = 1000) -> dict[str, Tensor]:
    return {
        "parameters.0.0": torch.full((size,), value),
        "optimizer.parameters.0.0.step": torch.tensor(value),
        "buffers.0": torch.full((3,), int(value), dtype=torch.int64),
        "half": torch.full((5,), value, dtype=torch.bfloat16),
    }


def take(snapshots: Snapshots, step: int, *, good: bool = False, tensors: dict[str, Tensor] | None = None) -> None:
    content = tensors if tensors is not None else state(float(step))
    snapshots.capture(step=step, tensors=content, blobs={"rng": bytes([step] * 7)}, meta={"step": step}, good=good)


def steps(snapshots: Snapshots) -> list[tuple[int, bool]]:
    return [(held.step, held.good) for held in snapshots.held()]


def test_restored_content_equals_what_was_captured(tmp_path: Path):
    take(open_slots(tmp_path), 9, good=True)
    reader = open_slots(tmp_path)
    live = {name: torch.zeros_like(tensor) for name, tensor in state(0.0).items()}
    content = reader.restore(reader.held()[0], live)
    assert content is not None
    assert (content.step, content.meta, content.blobs) == (9, {"step": 9}, {"rng": b"\x09" * 7})
    for name, tensor in state(9.0).items():
        assert torch.equal(live[name], tensor)
        assert content.tensors[name] is live[name]


@pytest.mark.parametrize("worth", [0, 2**60])
@pytest.mark.parametrize("verify_first", [False, True])
def test_who_hashes_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: int, verify_first: bool
):
    """Sizes that end within a block, several chunks, and a part that is not checked."""
    content = {"a": torch.randn(300_001), "b": torch.randn(17, dtype=torch.float64), "c": torch.randn(200_003)}
    content["a"][7] = float("nan")
    writer = open_slots(tmp_path)
    bad = writer.capture(step=1, tensors=content, blobs={}, meta={}, good=True, exempt={"a": ((5, 9),)})
    assert bad == []
    monkeypatch.setattr(slots_module, "WORTH_BYTES", worth)
    live = {name: torch.zeros_like(tensor) for name, tensor in content.items()}
    reader = open_slots(tmp_path)
    assert reader.restore(reader.held()[0], live, verify_first=verify_first) is not None
    for name, tensor in content.items():
        assert live[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_at_a_limit_of_threads_snapshots_are_taken_and_put_back_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    take(snapshots := open_slots(tmp_path), 9, good=True)
    live = {name: torch.zeros_like(tensor) for name, tensor in state(0.0).items()}
    assert snapshots.restore(snapshots.held()[0], live) is not None
    for name, tensor in state(9.0).items():
        assert torch.equal(live[name], tensor)


def test_tensors_without_a_live_counterpart_are_given_out(tmp_path: Path):
    weights = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    take(snapshots := open_slots(tmp_path), 1, tensors={"weights": weights, "empty": torch.empty(0, 3)})
    content = snapshots.restore(snapshots.held()[0], {})
    assert content is not None
    assert torch.equal(content.tensors["weights"], weights)
    assert content.tensors["weights"].stride() == weights.stride()
    assert content.tensors["empty"].shape == (0, 3)


def test_new_snapshots_replace_candidates_and_old_good_ones(tmp_path: Path):
    snapshots = open_slots(tmp_path, slots=2)
    take(snapshots, 0, good=True)
    take(snapshots, 10)
    assert steps(snapshots) == [(10, False), (0, True)]
    take(snapshots, 20)  # 10 was never shown to be good
    assert steps(snapshots) == [(20, False), (0, True)]
    snapshots.promote(before_step=20)
    assert steps(snapshots) == [(20, False), (0, True)]
    snapshots.promote(before_step=21)
    assert steps(snapshots) == [(20, True), (0, True)]
    take(snapshots, 30)
    assert steps(snapshots) == [(30, False), (20, True)]


def test_states_of_a_course_that_was_given_up_are_forgotten(tmp_path: Path):
    snapshots = open_slots(tmp_path)
    take(snapshots, 10, good=True)
    take(snapshots, 20)
    snapshots.discard_after(10)
    assert steps(snapshots) == [(10, True)]


def test_slots_of_another_run_attempt_or_model_are_not_used(tmp_path: Path):
    take(open_slots(tmp_path, "run/1/layout"), 5, good=True)
    other = open_slots(tmp_path, "run/2/layout")
    assert other.restore(other.held()[0], {}) is None


def test_growing_state_gets_a_larger_slot_and_the_other_stays_valid(tmp_path: Path):
    snapshots = open_slots(tmp_path)
    take(snapshots, 1, good=True)
    take(snapshots, 2, good=True, tensors=state(2.0, size=500_000))
    assert steps(snapshots) == [(2, True), (1, True)]
    for held in snapshots.held():
        assert snapshots.restore(held, {}) is not None


@pytest.mark.parametrize("verify_first", [False, True])
@pytest.mark.parametrize("where", range(0, 100, 7))
def test_any_flipped_bit_is_detected(tmp_path: Path, where: int, verify_first: bool):
    take(snapshots := open_slots(tmp_path), 5, good=True)
    used = snapshots._slots[snapshots.held()[0].slot]
    words = used._words
    head = words[slots_module._W_LAYOUT] + words[slots_module._W_META] + words[slots_module._W_BLOBS]
    begin, size = words[slots_module._W_START], words[slots_module._W_PAYLOAD]
    spots = [*range(24, 104), *range(128, 128 + head), *range(begin, begin + size)]
    at = spots[where * len(spots) // 100]
    flip(used.path, at, where % 8)
    reader = open_slots(tmp_path)
    live = {name: torch.full_like(tensor, 3) for name, tensor in state(0.0).items()}
    assert reader.restore(reader.held()[0], live, verify_first=verify_first) is None
    if verify_first:
        assert all(torch.equal(tensor, torch.full_like(tensor, 3)) for tensor in live.values())


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def test_a_flipped_bit_makes_no_candidate_good_and_none_newer_than_it_is(tmp_path: Path):
    take(snapshots := open_slots(tmp_path), 5)
    path = snapshots._slots[snapshots.held()[0].slot].path
    for bit in range(8):
        flip(path, 16 + bit, bit)
        assert steps(open_slots(tmp_path)) == [(5, False)]
        flip(path, 16 + bit, bit)
    flip(path, 8, 4)  # the generation
    reader = open_slots(tmp_path)
    assert reader.restore(reader.held()[0], {}) is None


@pytest.mark.parametrize("at", [0, 32, 56, 64, 72, 140, 180])
def test_rot_does_not_outlive_the_snapshot_that_it_hit(tmp_path: Path, at: int):
    """Sizes, layout and the like are the same for every snapshot, and written all the same."""
    snapshots = open_slots(tmp_path, slots=2)
    take(snapshots, 1)
    take(snapshots, 2)
    flip(snapshots._slots[snapshots.held()[-1].slot].path, at, 3)
    snapshots.discard_after(1)
    for step in (3, 4):
        take(snapshots, step)
    for held in snapshots.held():
        assert snapshots.restore(held, {}) is not None


# Soundness

POISONS = [float("nan"), float("inf"), float("-inf")]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e5m2]


@pytest.mark.row("T19")
@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_state_with_one_value_that_is_not_finite_is_never_published(
    tmp_path: Path, dtype: torch.dtype, poison: float
):
    snapshots = open_slots(tmp_path, slots=2)
    take(snapshots, 10, good=True)
    moments = torch.ones(300_000).to(dtype)
    tensors = {**state(20.0), "moments": moments}
    for at in (0, 131_071, 299_999):
        sound = moments[at].clone()
        moments[at] = torch.tensor(poison).to(dtype)
        assert snapshots.capture(step=20, tensors=tensors, blobs={}, meta={}, good=True) == ["moments"]
        moments[at] = sound
        snapshots.promote(before_step=1000)
        assert steps(snapshots) == [(10, True)]
    assert snapshots.capture(step=30, tensors=tensors, blobs={}, meta={}, good=False) == []
    assert steps(snapshots) == [(30, False), (10, True)]


def test_numbers_whose_squares_overflow_are_finite_all_the_same(tmp_path: Path):
    snapshots = open_slots(tmp_path)
    huge = {"moments": torch.full((5000,), 3e38), "half": torch.full((5000,), 65504.0, dtype=torch.float16)}
    assert snapshots.capture(step=1, tensors=huge, blobs={}, meta={}, good=True) == []
    assert steps(snapshots) == [(1, True)]


def test_exempt_elements_may_be_anything_and_their_neighbours_may_not(tmp_path: Path):
    snapshots = open_slots(tmp_path)
    mask = torch.zeros(400_000)
    mask[1000:350_000] = float("-inf")

    def capture(step: int) -> list[str]:
        exempt = {"buffers.0": ((1000, 350_000),)}
        return snapshots.capture(step=step, tensors={"buffers.0": mask}, blobs={}, meta={}, good=True, exempt=exempt)

    assert capture(1) == []
    content = snapshots.restore(snapshots.held()[0], {})
    assert content is not None
    assert torch.equal(content.tensors["buffers.0"], mask)
    for at in (999, 350_000):
        mask[at] = float("inf")
        assert capture(2) == ["buffers.0"]
        mask[at] = 0.0


# The cap


@pytest.fixture
def volume(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets what the memory volume has in all; what the snapshots take is taken off."""
    size = [1 << 40]

    def statvfs(directory: Path) -> Volume:
        used = sum(file.stat().st_size for file in directory.iterdir())
        return Volume(f_frsize=1, f_blocks=size[0], f_bavail=size[0] - used)

    monkeypatch.setattr(os, "statvfs", statvfs)

    def set_size(total: int) -> None:
        size[0] = total

    return set_size


def on_volume(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


SLOT = 2 * MIB + 17 * 4096
"""Of a state with 2 MiB of tensors: 64 KiB for facts and a page for the header and layout."""
BIG = {"parameters.0.0": torch.ones(MIB // 2)}


@pytest.mark.row("T19")
@pytest.mark.parametrize(("cap", "count"), [(2 * SLOT, 2), (3 * SLOT - 1, 2), (3 * SLOT, 3), (16 * SLOT, 3)])
def test_as_many_slots_as_the_cap_allows_and_never_a_byte_more(
    tmp_path: Path, cap: int, count: int, volume: Callable[[int], None]
):
    snapshots = open_slots(tmp_path, max_bytes=cap)
    for step in range(10):
        take(snapshots, step, good=True, tensors=BIG)
        assert snapshots.count == count
        assert on_volume(tmp_path) == snapshots.size_bytes <= cap


def test_without_a_cap_what_the_volume_offers_less_a_reserve_is_one(tmp_path: Path, volume: Callable[[int], None]):
    total = 3 * SLOT
    volume(total)
    snapshots = open_slots(tmp_path, slots=16)
    take(snapshots, 1, good=True, tensors=BIG)
    assert snapshots.count == 2
    assert on_volume(tmp_path) <= total - total // RESERVE_SHARE


def test_where_two_do_not_fit_there_is_none_and_the_memory_is_given_back(tmp_path: Path):
    snapshots = open_slots(tmp_path, max_bytes=2 * SLOT - 1)
    with pytest.raises(SnapshotError, match=r"two snapshots of 2.1 MiB do not fit .* offers 4.1 MiB; raise .*maxBytes"):
        take(snapshots, 1, good=True, tensors=BIG)
    assert on_volume(tmp_path) == 0
    assert snapshots.held() == []


@pytest.mark.row("T19")
def test_a_state_that_grows_gets_fewer_slots_and_what_matters_most_is_kept(tmp_path: Path):
    cap = 3 * SLOT
    snapshots = open_slots(tmp_path, slots=4, max_bytes=cap)
    for step in (1, 2, 3):
        take(snapshots, step, good=True)
    take(snapshots, 4)
    assert steps(snapshots) == [(4, False), (3, True), (2, True), (1, True)]
    take(snapshots, 5, tensors=BIG)
    assert on_volume(tmp_path) <= cap
    assert steps(snapshots) == [(5, False), (4, False), (3, True)]
    for held in snapshots.held():
        assert snapshots.restore(held, {}) is not None


def test_a_volume_that_fills_up_meanwhile_costs_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    granted = [0]
    allocate = os.posix_fallocate

    def stingy(descriptor: int, offset: int, size: int) -> None:
        if granted[0] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        granted[0] += 1
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", stingy)
    take(snapshots := open_slots(tmp_path, slots=5), 1, good=True)
    assert snapshots.count == 2
    assert len(list(tmp_path.iterdir())) == 2
    granted[0] = 2
    with pytest.raises(SnapshotError, match=r"No space left on device.*sharedMemorySize"):
        take(snapshots, 2, tensors=BIG)
    assert on_volume(tmp_path) == 0


def test_new_limits_hold_from_the_next_capture_on(tmp_path: Path):
    snapshots = open_slots(tmp_path, slots=4)
    for step in (1, 2, 3, 4):
        take(snapshots, step, good=True)
    snapshots.limit(slots=2, max_bytes=0)
    take(snapshots, 5, good=True)
    assert steps(snapshots) == [(5, True), (4, True)]
    assert len(list(tmp_path.iterdir())) == 2


def test_slots_are_allocated_once_for_as_long_as_the_state_is_of_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    take(snapshots := open_slots(tmp_path, slots=4), 1, good=True)
    monkeypatch.setattr(os, "posix_fallocate", pytest.fail)
    for step in range(2, 12):
        take(snapshots, step, good=True)
    assert snapshots.count == 4


def test_facts_that_grow_get_room(tmp_path: Path):
    snapshots = open_slots(tmp_path)
    for size in (10, 70_000, 700_000, 20):
        blobs = {"judge": os.urandom(size), "rng": b"x"}
        snapshots.capture(step=size, tensors=state(1.0), blobs=blobs, meta={"many": list(range(size // 10))}, good=True)
        content = snapshots.restore(snapshots.held()[0], {})
        assert content is not None
        assert (content.blobs, content.meta) == (blobs, {"many": list(range(size // 10))})
