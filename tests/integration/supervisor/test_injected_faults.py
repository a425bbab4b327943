"""Every kind of spec.faultInjection through the real supervisor and the real trainer: found, answered, told, and the
finished model has the bits of a run that nothing happened to (or that never saw the poisoned batches)."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from esper_leyline import env
from esper_leyline.exitcodes import ExitCode
from esper_leyline.pages import EmergencyRecord
from esper_leyline.phases import FaultKind
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.emergency_pb2 import EMERGENCY_MODE_FREEZE
from esper_runtime.tolaria.narrate import phase

from tests.support.supervised import Supervised
from tests.support.trainers import CODE, Pod, newest, same_bits
from tests.support.waiting import until_sync

pytestmark = pytest.mark.timeout(400)
STEP = 33
"""Late enough for a spike to be told from a warm-up."""
EPOCHS = 4
CHECKPOINT = {"everySteps": 8, "memory": {"everySteps": 5}}
DEADLINE_S = 200.0


@dataclass(frozen=True)
class Case:
    kind: FaultKind
    recovery: tuple[int, str] | None
    """Kind and cause."""
    to_step: int = 30
    skipped: tuple[int, ...] = ()
    restarts: int = 0
    moves: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


IN_PROCESS, IN_PLACE = pb.RECOVERY_KIND_IN_PROCESS, pb.RECOVERY_KIND_IN_PLACE
ROLLED_BACK = ("RUNNING>ROLLING_BACK", "ROLLING_BACK>RUNNING")
RESTARTED = ("RUNNING>RESTARTING", "RESTARTING>RUNNING")
CASES = (
    Case(FaultKind.NON_FINITE_LOSS, (IN_PROCESS, "NonFiniteLoss"), skipped=(STEP - 1,), moves=ROLLED_BACK),
    Case(FaultKind.NON_FINITE_GRADIENT, (IN_PROCESS, "NonFiniteGradient"), skipped=(STEP - 1,), moves=ROLLED_BACK),
    Case(FaultKind.LOSS_SPIKE, (IN_PROCESS, "LossSpike"), skipped=(STEP - 1, STEP, STEP + 1), moves=ROLLED_BACK),
    Case(FaultKind.CRASH, (IN_PLACE, "TrainerCrashed"), restarts=1, moves=RESTARTED),
    Case(FaultKind.HANG, (IN_PLACE, "Hang"), restarts=1, moves=RESTARTED),
    Case(FaultKind.KILL_TRAINER, (IN_PLACE, "TrainerKilled"), restarts=1, moves=RESTARTED),
    Case(FaultKind.SLOW_STEP, None, more={"milliseconds": 300}),
)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Supervised]:
    (tmp_path / "pod").mkdir()
    supervised = Supervised(tmp_path / "pod", trainer_module="esper_runtime.tolaria.trainer")
    (tmp_path / "pod" / "shm").mkdir()
    supervised.environ = {
        env.CODE_DIR: str(CODE),
        env.SHM_DIR: str(tmp_path / "pod" / "shm"),
        "OMP_NUM_THREADS": "1",
    }
    yield supervised
    supervised.close()


def test_every_kind_is_tried() -> None:
    assert {case.kind for case in CASES} == set(FaultKind)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_a_fault_is_found_answered_told_and_undone(case: Case, pod: Supervised, tmp_path: Path) -> None:
    health = {"heartbeatTimeoutSeconds": 10} if case.kind is FaultKind.HANG else {}
    pod.start(
        entrypoint="tiny:build",
        config={"epochs": EPOCHS},
        checkpoint=CHECKPOINT,
        health=health,
        faultInjection=[{"kind": case.kind, "step": STEP, **case.more}],
    )
    assert pod.wait(DEADLINE_S) == 0
    events = pod.events()
    injected = [e.notice for e in events if e.WhichOneof("event") == "notice" and e.notice.reason == "FaultInjected"]
    assert [notice.message for notice in injected] == [f"{case.kind} at step {STEP}"]
    recoveries = [e.recovery for e in events if e.WhichOneof("event") == "recovery"]
    expected = [] if case.recovery is None else [(*case.recovery, case.to_step)]
    failures = "\n".join(e.failure.message for e in events if e.WhichOneof("event") == "failure")
    assert [(r.kind, r.cause, r.to_step) for r in recoveries] == expected, failures
    assert all(r.verified and r.recover_ms > 0 for r in recoveries)
    assert transitions(events) == ["STARTING>RUNNING", *case.moves, "RUNNING>SUCCEEDED"]
    counters = events[-1].counters
    assert counters.rollbacks == (case.recovery is not None and case.recovery[0] == IN_PROCESS)
    assert (counters.in_place_restarts, counters.skipped_batches) == (case.restarts, len(case.skipped))
    word = pod.last_word()
    assert (word["reason"], word["exitCode"], word["step"]) == ("Complete", 0, 16 * EPOCHS - len(case.skipped))
    in_the_record(pod, case, events)
    reference = Pod(tmp_path / "reference").configure(config={"epochs": EPOCHS}, checkpoint=CHECKPOINT)
    assert reference.skipping(*case.skipped).exit_code == 0
    same_bits(newest(pod.checkpoints, uid="uid-1"), reference.newest())


def in_the_record(pod: Supervised, case: Case, events: list[pb.RuntimeEvent]) -> None:
    """The same story by trainers and supervisor together, each part of it once."""
    lines = pod.record()
    assert len({line["id"] for line in lines}) == len(lines)
    moves = [(line["fields"]["from"], line["fields"]["to"]) for line in lines if "from" in line["fields"]]
    told = [event.transition for event in events if event.WhichOneof("event") == "transition"]
    assert moves == [(phase(move.from_phase), phase(move.to_phase)) for move in told]
    died = [line["fields"]["reason"] for line in lines if line["event"] == "tolaria.trainer.failed"]
    assert case.recovery is None or died == [case.recovery[1]] * case.restarts
    said = pod.report()
    assert f"{case.restarts + 1} trainer process" in said
    assert ("TRAINER FAILED" in said) == (case.restarts > 0)
    assert "End:          Complete (0)" in said


def test_an_end_that_the_trainer_means_is_in_the_record_once(pod: Supervised) -> None:
    pod.start(entrypoint="tiny:nothing")
    assert pod.wait(DEADLINE_S) == ExitCode.USER_CODE
    told = [(line["event"], line["fields"]["reason"]) for line in pod.record()]
    reason = "EntrypointNotFound"
    assert told == [
        ("tolaria.run.failed", reason), ("tolaria.trainer.ended", reason), ("tolaria.transition", reason),
    ]  # fmt: skip
    assert f"End:          {reason} (71)" in pod.report()


def transitions(events: list[pb.RuntimeEvent]) -> list[str]:
    def name(phase: int) -> str:
        return pb.RuntimePhase.Name(phase).removeprefix("RUNTIME_PHASE_")

    moves = [event.transition for event in events if event.WhichOneof("event") == "transition"]
    return [f"{name(move.from_phase)}>{name(move.to_phase)}" for move in moves]


def test_a_drained_container_saves_and_its_successor_goes_on_bit_for_bit(pod: Supervised, tmp_path: Path) -> None:
    """SIGTERM in the middle: a checkpoint of the very step, exit code 143, nothing lost."""
    pod.environ[env.GRACE_SECONDS] = "60"
    config = {"entrypoint": "tiny:build", "config": {"epochs": 2000}, "checkpoint": CHECKPOINT}
    pod.start(**config)
    pod.started_training(STEP)
    pod.signal(signal.SIGTERM)
    assert pod.wait(DEADLINE_S) == 143
    word = pod.last_word()
    saved = word["savedStep"]
    assert (word["reason"], word["step"]) == ("Drained", saved)
    assert newest(pod.checkpoints, uid="uid-1").step == saved
    epochs = saved // 16 + 1
    config["config"] = {"epochs": epochs}
    for file in (pod.run_dir.parent / "shm").iterdir():  # another pod: memory is gone
        file.unlink()
    pod.start(**config)
    assert pod.wait(DEADLINE_S) == 0
    recovery = next(e.recovery for e in pod.events() if e.WhichOneof("event") == "recovery")
    assert (recovery.kind, recovery.to_step) == (pb.RECOVERY_KIND_POD_REPLACED, saved)
    reference = Pod(tmp_path / "reference").configure(config={"epochs": epochs}, checkpoint=CHECKPOINT)
    assert reference.train().exit_code == 0
    same_bits(newest(pod.checkpoints, uid="uid-1"), reference.newest())


def frozen(seq: int, *, clear: bool = False) -> EmergencyRecord:
    return EmergencyRecord(
        term=1, seq=seq, mode=EMERGENCY_MODE_FREEZE, clear=clear, attempt=0, signal_id="ab" * 16,
        arrived_ns=time.monotonic_ns(), source=1,
    )  # fmt: skip


def test_a_killed_trainer_goes_on_bit_for_bit_in_a_spare_that_was_ready(pod: Supervised, tmp_path: Path) -> None:
    """The spare has torch and the workload imported; a freeze holds training back until it is there."""
    epochs = 100
    pod.start(entrypoint="tiny:build", config={"epochs": epochs}, checkpoint=CHECKPOINT, settle_s=0.0)
    pod.started_training(STEP)
    pod.halt(frozen(1))
    spare = pod.spare()
    mapped = Path(f"/proc/{spare}/maps").read_text()
    assert "libtorch" in mapped
    assert str(pod.run_dir.parent) not in mapped, "no page, no snapshot"
    beat = pod.beat()
    assert beat is not None
    os.kill(beat.pid, signal.SIGKILL)
    until_sync(lambda: (now := pod.beat()) and now.pid == spare and now.phase == pb.RUNTIME_PHASE_FROZEN, DEADLINE_S)
    pod.halt(frozen(2, clear=True))
    assert pod.wait(DEADLINE_S) == 0
    events = pod.events()
    [recovery] = [event.recovery for event in events if event.WhichOneof("event") == "recovery"]
    assert (recovery.kind, recovery.cause, recovery.from_step) == (IN_PLACE, "TrainerKilled", beat.step)
    assert beat.step - 5 <= recovery.to_step <= beat.step
    assert not any(event.notice.reason == RunReason.SPARE_UNAVAILABLE for event in events)
    reference = Pod(tmp_path / "reference").configure(config={"epochs": epochs}, checkpoint=CHECKPOINT)
    assert reference.train().exit_code == 0
    same_bits(newest(pod.checkpoints, uid="uid-1"), reference.newest())


@pytest.mark.parametrize("grace_s", [30, 5])
@pytest.mark.parametrize("able", [True, False], ids=["it saves", "it hangs"])
def test_a_drain_ends_inside_the_grace_with_a_checkpoint(pod: Supervised, grace_s: int, able: bool) -> None:
    """A checkpoint of the very step, or, where the trainer cannot or is too slow, the last one; 143 either way."""
    pod.environ[env.GRACE_SECONDS] = str(grace_s)
    faults = [] if able else [{"kind": FaultKind.HANG, "step": STEP}]
    config = {"entrypoint": "tiny:build", "config": {"epochs": 100_000}, "checkpoint": CHECKPOINT}
    pod.start(**config, faultInjection=faults)
    pod.started_training(STEP if able else STEP - 1)
    manifests = pod.checkpoints / "uid-1" / "a00001"
    until_sync(lambda: list(manifests.glob("gen-*/manifest.json")), DEADLINE_S, "a checkpoint")
    until_sync(lambda: able or any(e.notice.reason == "FaultInjected" for e in pod.events()), DEADLINE_S, "the hang")
    asked_s = time.monotonic()
    pod.signal(signal.SIGTERM)
    assert pod.wait(DEADLINE_S) == 143
    took_s = time.monotonic() - asked_s
    word = pod.last_word()
    assert (word["reason"], word["exitCode"]) == ("Drained", 143)
    kept = newest(pod.checkpoints, uid="uid-1")
    assert kept.corrupt == ()
    if "savedStep" in word:
        assert able
        assert kept.step == word["savedStep"]
    else:
        assert took_s >= min(grace_s - 2.0, grace_s / 2), "it was killed before its time"
        assert "SIGKILL" in word["message"]
        assert kept.step % 8 == 0
        assert 0 < kept.step < STEP or able
