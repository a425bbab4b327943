import errno
from pathlib import Path

import pytest
import torch
from esper_leyline.phases import FaultKind
from esper_leyline.runconfig import Fault
from esper_leyline.v1 import report_pb2 as pb
from esper_runtime.checkpoint import Wal
from esper_runtime.checkpoint.wal import Kind, read_log
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.faults import SPIKE_FACTOR, Faults, InjectedCrash


class Told:
    """Stands for Events."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, reason: str, message: str, *, warning: bool = False) -> None:
        self.notices.append(message)


def facts(directory: Path) -> Facts:
    return Facts(Wal(directory / "wal.log"), run_seconds=lambda: 5.0)


def faults(known: Facts, *wanted: Fault, sleeps: list[float] | None = None, rank: int = 0) -> tuple[Faults, Told]:
    told = Told()
    sleep = (sleeps if sleeps is not None else []).append
    return Faults(wanted, rank=rank, facts=known, events=told, spike_steps=3, sleep=sleep), told  # type: ignore[arg-type]


def test_fault_fires_once_per_run_even_after_a_restart(tmp_path: Path):
    crash = Fault(kind=FaultKind.CRASH, step=4)
    injected, told = faults(facts(tmp_path), crash)
    injected.before_step(3)
    with pytest.raises(InjectedCrash):
        injected.before_step(4)
    assert told.notices == ["Crash at step 4"]
    injected, _ = faults(facts(tmp_path), crash)
    injected.before_step(4)


def test_same_fault_listed_twice_fires_twice(tmp_path: Path):
    sleeps: list[float] = []
    slow = Fault(kind=FaultKind.SLOW_STEP, step=4, milliseconds=20)
    injected, _ = faults(facts(tmp_path), slow, slow, sleeps=sleeps)
    injected.before_step(4)
    injected.before_step(4)
    assert sleeps == [0.02, 0.02]


def test_spike_lasts_as_long_as_it_must_to_be_found(tmp_path: Path):
    injected, _ = faults(facts(tmp_path), Fault(kind=FaultKind.LOSS_SPIKE, step=2))
    one = torch.tensor(1.0)
    assert [float(injected.on_loss(step, one)) for step in range(1, 7)] == [1, *[SPIKE_FACTOR] * 3, 1, 1]


def test_rollback_ends_a_spike(tmp_path: Path):
    injected, _ = faults(facts(tmp_path), Fault(kind=FaultKind.LOSS_SPIKE, step=2))
    injected.on_loss(2, torch.tensor(1.0))
    injected.rolled_back()
    assert float(injected.on_loss(3, torch.tensor(1.0))) == 1.0


def test_fault_of_another_rank_is_not_ours(tmp_path: Path):
    injected, _ = faults(facts(tmp_path), Fault(kind=FaultKind.CRASH, step=1, rank=1))
    injected.before_step(1)


def test_fault_that_cannot_be_recorded_does_not_fire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = facts(tmp_path)
    full(known, monkeypatch)
    injected, told = faults(known, Fault(kind=FaultKind.CRASH, step=1))
    injected.before_step(1)
    assert "not injected" in told.notices[0]


def test_counters_go_on_in_memory_when_the_log_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = facts(tmp_path)
    known.rolled_back(cause="NonFiniteLoss", from_step=3, to_step=2)
    full(known, monkeypatch)
    assert not known.record(Kind.SKIP, positions=[4])
    assert known.counters() == pb.Counters(rollbacks=1, skipped_batches=1)
    assert "No space left" in known.lost


@pytest.mark.parametrize("how", ["by the next fact", "when told that the volume works"])
def test_what_the_log_refused_is_in_it_once_it_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    known = facts(tmp_path)
    known.rolled_back(cause="NonFiniteLoss", from_step=3, to_step=2)
    with monkeypatch.context() as broken:
        full(known, broken)
        known.record(Kind.SKIP, positions=[4])
        known.record(Kind.FAULT, key="0:Crash:7")
        known.record(Kind.LEARNING_RATE, scale=0.5)
    if how == "by the next fact":
        assert known.record(Kind.RESTART)
    else:
        known.settle()
    assert known.lost == ""
    known._wal.close()
    again = facts(tmp_path)
    assert again.state == known.state
    assert again.state.skipped_positions == (4,)
    again._wal.close()


def test_a_rollback_and_all_that_it_changes_for_good_are_one_record(tmp_path: Path):
    """So that no kill can come between them."""
    known = facts(tmp_path)
    known.rolled_back(cause="NonFiniteLoss", from_step=3, to_step=2, skipped=[7, 8], scale=0.5)
    known._wal.close()
    found = read_log(tmp_path / "wal.log")
    assert found.records == 1
    assert (found.state.rollbacks, found.state.skipped_positions) == (1, (7, 8))
    assert (found.state.skipped_batches, found.state.learning_rate_scale) == (2, 0.5)


def test_settling_writes_nothing_when_nothing_is_lost(tmp_path: Path):
    known = facts(tmp_path)
    known.record(Kind.SKIP, positions=[4])
    before = (tmp_path / "wal.log").read_bytes()
    known.settle()
    assert (tmp_path / "wal.log").read_bytes() == before


def test_rollbacks_are_counted_by_the_run_s_own_clock(tmp_path: Path):
    now = [100.0]
    known = Facts(Wal(tmp_path / "wal.log"), run_seconds=lambda: now[0])
    known.rolled_back(cause="LossSpike", from_step=3, to_step=2)
    now[0] = 150.0
    assert known.rollbacks_within(60) == 1
    now[0] = 161.0
    assert known.rollbacks_within(60) == 0


def full(known: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(known._wal, "append", refuse)
