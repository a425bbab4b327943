import errno
import os
from pathlib import Path

import pytest
import torch
from esper_runtime.tolaria.snapshot import SnapshotError, Snapshots
from torch import Tensor


def open_slots(directory: Path, identity: str = "run/1/layout") -> Snapshots:
    return Snapshots(directory, identity=identity)


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


def test_tensors_without_a_live_counterpart_are_given_out(tmp_path: Path):
    weights = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    take(snapshots := open_slots(tmp_path), 1, tensors={"weights": weights, "empty": torch.empty(0, 3)})
    content = snapshots.restore(snapshots.held()[0], {})
    assert content is not None
    assert torch.equal(content.tensors["weights"], weights)
    assert content.tensors["weights"].stride() == weights.stride()
    assert content.tensors["empty"].shape == (0, 3)


def test_new_snapshots_replace_candidates_and_old_good_ones(tmp_path: Path):
    snapshots = open_slots(tmp_path)
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


@pytest.mark.parametrize("where", range(0, 100, 7))
def test_any_flipped_bit_is_detected(tmp_path: Path, where: int):
    take(snapshots := open_slots(tmp_path), 5, good=True)
    used = snapshots._files[snapshots.held()[0].slot]
    begin, words = used._words[7], used._words
    spots = [*range(24, 88), *range(128, 128 + words[4] + words[5]), *range(begin, begin + 4000)]
    at = spots[where * len(spots) // 100]
    with used.path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << (where % 8))]))
    reader = open_slots(tmp_path)
    assert reader.restore(reader.held()[0], {}) is None


def test_full_memory_volume_names_the_remedy_and_keeps_the_other_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    take(snapshots := open_slots(tmp_path), 1, good=True)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SnapshotError, match="sharedMemorySize"):
        take(snapshots, 2)
    assert steps(snapshots) == [(1, True)]
