"""The supervisor with real processes, signals, files and sockets; the trainer is a small one without torch."""

import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest
from esper_leyline import env, paths
from esper_leyline.exitcodes import ExitCode
from esper_leyline.pages import EmergencyRecord, Page
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.emergency_pb2 import (
    ACK_STAGE_DONE,
    ACK_STAGE_SEEN,
    EMERGENCY_MODE_CHECKPOINT,
    EMERGENCY_MODE_FREEZE,
    EMERGENCY_MODE_KILL,
)
from esper_runtime.checkpoint import Wal

from tests.support.supervised import DEADLINE_S, FakeWeatherlight, Supervised
from tests.support.waiting import until_sync

STAY = {"stay": True}
NEVER = 3600.0
"""No look at intervals: a signal or a byte alone must wake the supervisor."""
pytestmark = pytest.mark.timeout(180)


def kinds(events: list[pb.RuntimeEvent]) -> list[str]:
    return [str(event.WhichOneof("event")) for event in events]


def signal_record(mode: int, *, attempt: int = 0, seq: int = 1, clear: bool = False) -> EmergencyRecord:
    return EmergencyRecord(
        term=1, seq=seq, mode=mode, clear=clear, attempt=attempt, signal_id="ab" * 16,
        arrived_ns=time.monotonic_ns(), source=1,
    )  # fmt: skip


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_complete_trainer_ends_the_container_with_0(pod: Supervised):
    pod.start([{"steps": 5}])
    assert pod.wait() == ExitCode.COMPLETE
    events = pod.events()
    assert kinds(events) == ["boot"]
    assert events[0].writer == "supervisor"
    assert (events[0].boot.attempt, events[0].boot.incarnation, events[0].boot.world_size) == (1, 1, 1)
    assert events[0].HasField("counters")
    word = pod.last_word()
    assert (word["reason"], word["exitCode"], word["step"], word["epoch"]) == ("Complete", 0, 5, 1)


def test_pages_and_journal_are_for_the_group_and_nobody_else(pod: Supervised):
    pod.start()
    pod.wait()
    for name in (paths.TRAINER_PAGE, paths.SUPERVISOR_PAGE, paths.JOURNAL):
        assert (pod.run_dir / name).stat().st_mode & 0o777 == 0o660, name


def test_incarnations_are_counted_on_the_volume(pod: Supervised):
    for expected in ("1", "2", "3"):
        pod.start([{"steps": 1}])
        pod.wait()
        assert pod.started(1)[env.INCARNATION] == expected


def test_a_killed_trainer_is_started_again_and_told_why(pod: Supervised):
    weatherlight = FakeWeatherlight(pod.run_dir)
    pod.start([{"steps": 10, **STAY}, {"from": 10, "steps": 5}], tick_s=NEVER)
    weatherlight.accept()
    first = pod.started(1)
    pod.stepped(first["pid"], 10)
    killed_ns = time.monotonic_ns()
    os.kill(first["pid"], signal.SIGKILL)
    assert pod.wait() == 0
    second = pod.started(2)
    assert second[env.TRAINER_START] == "2"
    assert second[env.RECOVERY_CAUSE] == RunReason.TRAINER_KILLED
    assert second[env.RECOVERY_STEP] == "10"
    assert env.RECOVERY_CAUSE not in first
    assert killed_ns <= int(second[env.RECOVERY_DETECTED_NS]) <= time.monotonic_ns()
    weatherlight.close()
    boot, failure, transition = pod.events()
    assert boot.WhichOneof("event") == "boot"
    assert failure.failure.reason == RunReason.TRAINER_KILLED
    assert failure.failure.exit_code == 137
    assert (failure.failure.container, failure.failure.step) == ("tolaria", 10)
    assert transition.transition.from_phase == pb.RUNTIME_PHASE_RUNNING
    assert transition.transition.to_phase == pb.RUNTIME_PHASE_RESTARTING
    assert transition.counters.in_place_restarts == 1
    assert Wal(pod.checkpoints / "uid-1" / "wal.log").replay().in_place_restarts == 1


def test_restarts_are_counted_over_incarnations(pod: Supervised):
    for _ in range(2):
        pod.start([{"steps": 2, "exit": 1}, {"steps": 4}])
        assert pod.wait() == 0
    failures = [event for event in pod.events() if event.WhichOneof("event") == "failure"]
    assert [event.counters.in_place_restarts for event in failures] == [1, 2]


def test_three_starts_without_a_new_step_end_the_container(pod: Supervised):
    word = {"reason": "TrainerCrashed", "message": "ValueError: no such luck", "exitCode": 1, "savedStep": 4}
    pod.start([{"steps": 6, "exit": 1}, {"from": 4, "steps": 1, "exit": 1, "last_word": word}])
    assert pod.wait() == ExitCode.TRAINER_CRASHED
    assert not (pod.run_dir / "start-5.json").exists()
    assert pod.started(4)[env.TRAINER_START] == "4"
    last = pod.last_word()
    assert last["reason"] == RunReason.RESTARTS_EXHAUSTED
    assert (last["exitCode"], last["savedStep"]) == (70, 4)
    assert "no such luck" in last["message"]
    *_, failure, transition = pod.events()
    assert failure.failure.exit_code == 1
    assert "no such luck" in failure.failure.message
    assert transition.transition.to_phase == pb.RUNTIME_PHASE_FAILED


# Starts that the system refuses


def test_a_supervisor_that_gets_no_thread_for_its_probes_trains_on(pod: Supervised):
    pod.prelude = """
import threading
def refuse(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
"""
    pod.start([{"steps": 5}])
    assert pod.wait() == 0


def refusals(pod: Supervised) -> list[str]:
    failures = [event.failure for event in pod.events() if event.WhichOneof("event") == "failure"]
    assert all(failure.reason == RunReason.TRAINER_CRASHED for failure in failures if "not be" in failure.message)
    return [failure.message for failure in failures if failure.message.startswith("trainer could not be started")]


def test_a_first_start_at_a_limit_of_processes_is_tried_again(pod: Supervised):
    pod.refuse(starts=2)
    pod.start([{"steps": 5}])
    assert pod.wait() == 0
    first = pod.started(1)
    assert first[env.TRAINER_START] == "1", "a trainer that was never there is no predecessor"
    assert env.RECOVERY_CAUSE not in first
    message = f"trainer could not be started: [Errno 11] Resource temporarily unavailable: '{pod.python}'"
    assert refusals(pod) == [message, message]
    assert kinds(pod.events()) == ["boot", "failure", "failure"]
    assert Wal(pod.checkpoints / "uid-1" / "wal.log").replay().in_place_restarts == 0


def test_a_restart_at_a_limit_of_processes_is_tried_again_and_recovers_from_the_death(pod: Supervised):
    pod.start([{"steps": 10, **STAY}, {"from": 10, "steps": 5}])
    first = pod.started(1)["pid"]
    pod.stepped(first, 10)
    pod.refuse(starts=2)
    os.kill(first, signal.SIGKILL)
    assert pod.wait() == 0
    second = pod.started(2)
    assert (second[env.TRAINER_START], second[env.RECOVERY_CAUSE]) == ("2", RunReason.TRAINER_KILLED)
    assert second[env.RECOVERY_STEP] == "10"
    assert kinds(pod.events()) == ["boot", "failure", "transition", "failure", "failure"]
    assert len(refusals(pod)) == 2
    assert Wal(pod.checkpoints / "uid-1" / "wal.log").replay().in_place_restarts == 1


def test_a_trainer_that_can_never_be_started_ends_like_one_that_crashes_in_a_loop(pod: Supervised, tmp_path: Path):
    pod.python = str(tmp_path / "python")
    Path(pod.python).touch()  # there, and not executable
    pod.start()
    assert pod.wait() == ExitCode.TRAINER_CRASHED
    word = pod.last_word()
    assert (word["reason"], word["exitCode"]) == (RunReason.RESTARTS_EXHAUSTED, 70)
    assert "Permission denied" in word["message"]
    assert "3 starts in a row made no new step" in word["message"]
    *_, transition = pod.events()
    assert kinds(pod.events()) == ["boot", "failure", "failure", "failure", "transition"]
    assert (transition.transition.from_phase, transition.transition.to_phase) == (
        pb.RUNTIME_PHASE_STARTING, pb.RUNTIME_PHASE_FAILED,
    )  # fmt: skip


def test_recreate_leaves_a_refused_start_to_the_operator(pod: Supervised):
    pod.refuse(starts=1)
    pod.start(restart={"strategy": "Recreate"})
    assert pod.wait() == ExitCode.TRAINER_CRASHED
    assert pod.last_word()["reason"] == RunReason.TRAINER_CRASHED


@pytest.mark.parametrize("code", [71, 72, 73, 74, 75, 78, 143])
def test_what_the_trainer_means_is_what_the_container_says(pod: Supervised, code: int):
    word = {"reason": "UserCodeError", "message": "said so", "exitCode": code, "step": 3, "savedStep": 2}
    pod.start([{"steps": 3, "exit": code, "last_word": word}])
    assert pod.wait() == code
    assert pod.last_word() == {**word, "epoch": 1}


def test_recreate_leaves_the_restart_to_the_operator(pod: Supervised):
    pod.start([{"steps": 2, "signal": signal.SIGKILL}], restart={"strategy": "Recreate"})
    assert pod.wait() == ExitCode.TRAINER_CRASHED
    assert not (pod.run_dir / "start-2.json").exists()
    assert pod.last_word()["reason"] == RunReason.TRAINER_KILLED


def test_a_crash_by_signal_is_told_as_128_plus_n(pod: Supervised):
    pod.start([{"steps": 2, "signal": signal.SIGSEGV}, {"from": 2, "steps": 2}])
    assert pod.wait() == 0
    failure = next(event.failure for event in pod.events() if event.WhichOneof("event") == "failure")
    assert (failure.reason, failure.exit_code) == (RunReason.TRAINER_CRASHED, 139)


def test_sigterm_goes_on_to_the_trainer(pod: Supervised):
    pod.start([{**STAY, "drain_s": 0.1}])
    pod.stepped(pod.started(1)["pid"], 3)
    pod.signal(signal.SIGTERM)
    assert pod.wait() == ExitCode.DRAINED
    assert kinds(pod.events()) == ["boot"]


def test_a_trainer_that_ignores_sigterm_is_killed_before_the_grace_ends(pod: Supervised):
    pod.environ[env.GRACE_SECONDS] = "3"
    pod.start([{**STAY, "drain_s": None}])
    pid = pod.started(1)["pid"]
    pod.stepped(pid, 3)
    asked = time.monotonic()
    pod.signal(signal.SIGTERM)
    pod.signal(signal.SIGTERM)
    assert pod.wait() == ExitCode.DRAINED
    assert time.monotonic() - asked >= 1.4
    assert gone(pid)
    word = pod.last_word()
    assert (word["reason"], word["exitCode"]) == (RunReason.DRAINED, 143)
    assert "SIGKILL" in word["message"]


def test_sigterm_during_a_back_off_ends_at_once(pod: Supervised):
    pod.start([{"steps": 0, "exit": 1}])
    pod.started(2)
    until_sync(lambda: kinds(pod.events()).count("failure") == 2, DEADLINE_S, "the second death")
    pod.signal(signal.SIGTERM)
    assert pod.wait() == ExitCode.DRAINED
    assert not (pod.run_dir / "start-3.json").exists()


def test_a_stopped_trainer_is_a_hang_and_is_replaced(pod: Supervised):
    pod.start([STAY, {"from": 5, "steps": 4}], health={"heartbeatTimeoutSeconds": 1})
    first = pod.started(1)["pid"]
    pod.stepped(first, 5)
    os.kill(first, signal.SIGSTOP)
    assert pod.wait() == 0
    assert gone(first)
    assert pod.started(2)[env.RECOVERY_CAUSE] == RunReason.HANG
    assert pod.started(2)[env.RECOVERY_STEP] == "5"


def test_a_hung_trainer_leaves_its_stacks(pod: Supervised):
    pod.start([{"freeze": True}, {"from": 5, "steps": 4}], health={"heartbeatTimeoutSeconds": 1})
    assert pod.wait() == 0
    failure = next(event.failure for event in pod.events() if event.WhichOneof("event") == "failure")
    assert failure.reason == RunReason.HANG
    assert "in main" in failure.message


def test_beats_without_a_step_are_a_hang_after_the_progress_timeout(pod: Supervised):
    pod.start([STAY, {"from": 5, "steps": 4}], health={"progressTimeoutSeconds": 1})
    assert pod.wait() == 0
    failure = next(event.failure for event in pod.events() if event.WhichOneof("event") == "failure")
    assert failure.reason == RunReason.HANG
    assert failure.step == 5


def test_a_frozen_trainer_is_no_hang(pod: Supervised):
    limits = {"heartbeatTimeoutSeconds": 1, "progressTimeoutSeconds": 1}
    pod.start([{"phase": pb.RUNTIME_PHASE_FROZEN, **STAY}], health=limits)
    pid = pod.started(1)["pid"]
    pod.stepped(pid, 5)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2.5)  # longer than both limits: the assertion is that nothing happens
    assert not gone(pid)
    assert kinds(pod.events()) == ["boot"]
    pod.signal(signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    assert pod.wait() == ExitCode.DRAINED


def test_three_hangs_end_the_container_as_hung(pod: Supervised):
    pod.start([{"steps": 0, "freeze": True}], health={"heartbeatTimeoutSeconds": 1})
    assert pod.wait() == ExitCode.HUNG
    assert pod.last_word()["reason"] == RunReason.HANG


def test_kill_stops_at_once_and_is_acknowledged(pod: Supervised):
    weatherlight = FakeWeatherlight(pod.run_dir)
    pod.start([STAY], tick_s=NEVER)
    assert weatherlight.accept() == "tolaria 0 1\n"
    pid = pod.started(1)["pid"]
    pod.stepped(pid, 5)
    pod.halt(signal_record(EMERGENCY_MODE_KILL, attempt=1))
    weatherlight.poke()
    until_sync(lambda: gone(pid), DEADLINE_S, "the trainer is gone")
    assert pod.wait() == ExitCode.HALTED
    assert weatherlight.rest() == b"x"
    weatherlight.close()
    events = pod.events()
    acks = [event.ack for event in events if event.WhichOneof("event") == "ack"]
    assert [ack.stage for ack in acks] == [ACK_STAGE_SEEN, ACK_STAGE_DONE]
    assert all(ack.signal_id == "ab" * 16 and ack.run_uid == "uid-1" and ack.step == 5 for ack in acks)
    assert not any(ack.HasField("saved_step") for ack in acks)
    assert events[-1].transition.to_phase == pb.RUNTIME_PHASE_HALTED
    assert "savedStep" not in pod.last_word()


def test_a_kill_for_another_attempt_is_ignored(pod: Supervised):
    weatherlight = FakeWeatherlight(pod.run_dir)
    pod.start([{"steps": 30}])
    weatherlight.accept()
    pod.halt(signal_record(EMERGENCY_MODE_KILL, attempt=2))
    weatherlight.poke()
    assert pod.wait() == 0
    assert weatherlight.rest() == b"x"
    weatherlight.close()


def test_a_kill_that_was_there_first_lets_no_trainer_start(pod: Supervised):
    pod.halt(signal_record(EMERGENCY_MODE_KILL))
    pod.start([STAY])
    assert pod.wait() == ExitCode.HALTED
    assert not (pod.run_dir / "start-1.json").exists()


def test_freeze_is_the_trainers_business(pod: Supervised):
    pod.halt(signal_record(EMERGENCY_MODE_FREEZE))
    pod.start([{"steps": 5}])
    assert pod.wait() == 0


def test_a_hung_trainer_cannot_save_so_checkpoint_becomes_kill(pod: Supervised):
    pod.start([{"freeze": True}], health={"heartbeatTimeoutSeconds": 1})
    pod.stepped(pod.started(1)["pid"], 5)
    pod.halt(signal_record(EMERGENCY_MODE_CHECKPOINT))
    assert pod.wait() == ExitCode.HALTED
    assert "savedStep" not in pod.last_word()
    assert kinds(pod.events()) == ["boot", "ack", "ack", "transition"]


def test_weatherlight_may_come_late_and_come_back(pod: Supervised):
    pod.start([STAY])
    pod.stepped(pod.started(1)["pid"], 3)
    for _ in range(2):
        weatherlight = FakeWeatherlight(pod.run_dir)
        assert weatherlight.accept() == "tolaria 0 1\n"
        weatherlight.close()
    weatherlight = FakeWeatherlight(pod.run_dir)
    weatherlight.accept()
    pod.halt(signal_record(EMERGENCY_MODE_KILL))
    weatherlight.poke()
    assert pod.wait() == ExitCode.HALTED
    weatherlight.close()


def test_a_killed_supervisor_takes_its_trainer_along(pod: Supervised):
    weatherlight = FakeWeatherlight(pod.run_dir)
    pod.start([STAY])
    weatherlight.accept()
    pid = pod.started(1)["pid"]
    pod.signal(signal.SIGKILL)
    assert pod.wait() == -signal.SIGKILL
    assert weatherlight.rest() == b""
    weatherlight.close()
    until_sync(lambda: gone(pid), DEADLINE_S, "the orphan is gone")


def test_another_runs_directory_is_refused_by_name(pod: Supervised):
    (pod.checkpoints / "claimed-by").write_text("other-uid\n")
    pod.start()
    assert pod.wait() == ExitCode.CHECKPOINT_DIR
    word = pod.last_word()
    assert word["reason"] == RunReason.CHECKPOINT_DIR_UNUSABLE
    assert "other-uid" in word["message"]


def test_a_config_that_cannot_be_read_is_a_config_error(pod: Supervised):
    pod.start(entrypoint=7)
    assert pod.wait() == ExitCode.CONFIG
    assert "entrypoint" in pod.last_word()["message"]


def test_probe_and_metrics_answer(pod: Supervised):
    pod.start([STAY])
    pod.stepped(pod.started(1)["pid"], 3)
    port = int(until_sync((pod.run_dir / "tolaria.port").read_text, DEADLINE_S, "the port file"))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=DEADLINE_S) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE_S) as answer:
        assert "esper_tolaria_trainer_starts_total 1\n" in answer.read().decode()


def test_the_supervisors_page_tells_what_it_does(pod: Supervised):
    pod.start([STAY])
    pid = pod.started(1)["pid"]
    page = Page.open(pod.run_dir / paths.SUPERVISOR_PAGE)
    until_sync(lambda: page.read()[:3] == (pb.RUNTIME_PHASE_RUNNING, pid, 0), DEADLINE_S, "running")
    pod.signal(signal.SIGTERM)
    assert pod.wait() == ExitCode.DRAINED
    assert page.read()[0] == pb.RUNTIME_PHASE_STOPPING
