"""The spare trainer with real processes: used, made again, mistrusted, given up. The trainer is a small one."""

import os
import signal
from pathlib import Path

import pytest
from esper_leyline import env, paths
from esper_leyline.exitcodes import ExitCode
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import report_pb2 as pb
from esper_runtime.tolaria.supervisor.spare import FAILURE_LIMIT

from tests.support.supervised import DEADLINE_S, Supervised
from tests.support.waiting import until_sync

STAY = {"stay": True}
pytestmark = pytest.mark.timeout(180)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def notices(pod: Supervised) -> list[str]:
    found = [event.notice for event in pod.events() if event.WhichOneof("event") == "notice"]
    return [notice.message for notice in found if notice.reason == RunReason.SPARE_UNAVAILABLE]


def kill_trainer(pod: Supervised, start: int) -> int:
    pid = int(pod.started(start)["pid"])
    pod.stepped(pid, 5)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_the_spare_becomes_the_trainer_and_another_one_takes_its_place(pod: Supervised):
    pod.start([STAY], settle_s=0.0)
    spares = []
    for start in (1, 2, 3):
        spares.append(pod.spare())
        kill_trainer(pod, start)
        begun = pod.started(start + 1)
        assert begun["pid"] == spares[-1]
        assert begun[env.TRAINER_START] == str(start + 1)
        assert begun[env.INCARNATION] == "1"
        assert begun[env.RECOVERY_CAUSE] == RunReason.TRAINER_KILLED
        assert begun[env.RECOVERY_STEP] == "5"
        assert int(begun[env.RECOVERY_DETECTED_NS]) > 0
        assert Path(f"/proc/{begun['pid']}/comm").read_text() != "esper-spare\n"
        pod.stepped(begun["pid"], 5)
    assert len(set(spares)) == 3
    until_sync(lambda: (pod.metric("trainer_restart_seconds") or 0) > 0, DEADLINE_S, "the restart's time")
    assert pod.metric("spare_starts_total") in (3, 4)
    pod.signal(signal.SIGTERM)
    assert pod.wait() == ExitCode.DRAINED
    assert notices(pod) == []


def test_a_spare_touches_nothing_and_is_the_first_to_go(pod: Supervised):
    pod.start([STAY], settle_s=0.0)
    spare = pod.spare()
    assert Path(f"/proc/{spare}/oom_score_adj").read_text() == "1000\n"
    opened = {os.path.realpath(link) for link in Path(f"/proc/{spare}/fd").iterdir()}
    mapped = Path(f"/proc/{spare}/maps").read_text()
    for place in (pod.run_dir, pod.checkpoints):
        assert not any(name.startswith(str(place)) for name in opened)
        assert str(place) not in mapped
    assert not (pod.run_dir / "start-2.json").exists()
    before = Path(f"/proc/{os.getpid()}/oom_score_adj").read_text()
    kill_trainer(pod, 1)
    assert pod.started(2)["pid"] == spare
    assert Path(f"/proc/{spare}/oom_score_adj").read_text() == before


def test_a_spare_that_is_needed_before_it_is_ready_is_used_all_the_same(pod: Supervised):
    pod.start([STAY], settle_s=0.0)
    pod.stepped(pod.started(1)["pid"], 1)
    spare = until_sync(lambda: next(iter(set(pod.children()) - {pod.started(1)["pid"]}), None), DEADLINE_S, "a spare")
    kill_trainer(pod, 1)
    assert pod.started(2)["pid"] == spare


def test_a_spare_that_dies_is_made_again(pod: Supervised):
    pod.start([STAY], settle_s=0.0, spare_limit_s=2.0)
    first = pod.spare()
    os.kill(first, signal.SIGKILL)
    until_sync(lambda: gone(first), DEADLINE_S, "the end of the first")
    second = pod.spare()
    assert second != first
    kill_trainer(pod, 1)
    assert pod.started(2)["pid"] == second


@pytest.mark.parametrize(("how", "words"), [("fail", "no such luck"), ("exit", "3 times in a row, with 3 at last")])
def test_a_spare_that_cannot_be_made_is_said_once_and_a_restart_goes_without(pod: Supervised, how: str, words: str):
    pod.environ["FAKE_WARM"] = how
    pod.start([STAY], settle_s=0.0, spare_limit_s=0.05)
    until_sync(lambda: pod.metric("spare_starts_total") == 3, DEADLINE_S, "three tries")
    [notice] = until_sync(lambda: notices(pod), DEADLINE_S, "a notice")
    assert words in notice
    until_sync(lambda: len(pod.children()) == 1, DEADLINE_S, "the end of the third")
    first = kill_trainer(pod, 1)
    second = pod.started(2)["pid"]
    assert second != first
    pod.stepped(second, 5)
    assert (pod.metric("spare_ready"), pod.metric("spare_starts_total")) == (0, 3)
    assert len(notices(pod)) == 1


def test_an_import_that_hangs_in_a_spare_ends_in_a_cold_start(pod: Supervised):
    pod.environ["FAKE_WARM"] = "hang"
    pod.start([STAY], settle_s=0.0, spare_limit_s=0.5)
    until_sync(lambda: pod.metric("spare_starts_total") == 1, DEADLINE_S, "a spare that hangs")
    spare = next(pid for pid in pod.children() if pid != pod.started(1)["pid"])
    kill_trainer(pod, 1)
    second = pod.started(2)
    assert second["pid"] != spare
    assert second[env.RECOVERY_CAUSE] == RunReason.TRAINER_KILLED
    pod.stepped(second["pid"], 5)
    until_sync(lambda: gone(spare), DEADLINE_S, "the end of the hung spare")
    assert "an import hangs" in notices(pod)[0]
    assert sum(event.WhichOneof("event") == "failure" for event in pod.events()) == 1, "its end is no second death"


def test_a_cold_start_after_a_hung_spare_that_is_refused_is_tried_again(pod: Supervised):
    pod.environ["FAKE_WARM"] = "hang"
    pod.start([STAY], settle_s=0.0, spare_limit_s=0.5)
    until_sync(lambda: pod.metric("spare_starts_total") == 1, DEADLINE_S, "a spare that hangs")
    pod.refuse(starts=1)
    kill_trainer(pod, 1)
    second = pod.started(2)
    assert second[env.RECOVERY_CAUSE] == RunReason.TRAINER_KILLED
    pod.stepped(second["pid"], 5)


def test_a_spare_at_a_limit_of_processes_is_tried_again_until_it_is_there(pod: Supervised):
    """More often than one that fails by itself: what the system lacks may come back."""
    pod.refuse(spares=FAILURE_LIMIT + 2)
    pod.start([STAY], settle_s=0.0, spare_limit_s=0.01)
    spare = pod.spare()
    [notice] = notices(pod)
    assert "Resource temporarily unavailable" in notice
    assert pod.metric("spare_starts_total") == 1
    first = kill_trainer(pod, 1)
    assert pod.started(2)["pid"] == spare != first


def test_recreate_wants_no_spare(pod: Supervised):
    pod.start([STAY], settle_s=0.0, restart={"strategy": "Recreate"})
    pod.stepped(pod.started(1)["pid"], 5)
    until_sync(lambda: pod.metric("trainer_step") == 5, DEADLINE_S, "looks")
    assert pod.metric("spare_starts_total") == 0
    assert len(pod.children()) == 1


def test_a_drain_ends_the_spare(pod: Supervised):
    pod.start([{**STAY, "drain_s": 3600.0}], settle_s=0.0)
    spare = pod.spare()
    pod.signal(signal.SIGTERM)
    until_sync(lambda: gone(spare), DEADLINE_S, "the end of the spare")
    assert pod.wait() == ExitCode.DRAINED


def test_a_killed_supervisor_takes_its_spare_along(pod: Supervised):
    pod.start([STAY], settle_s=0.0)
    spare = pod.spare()
    pod.signal(signal.SIGKILL)
    pod.wait()
    until_sync(lambda: gone(spare), DEADLINE_S, "the orphan is gone")


def test_three_fruitless_starts_end_the_container_with_a_spare_too(pod: Supervised):
    pod.start([{"steps": 5, "exit": 1}, {"from": 4, "steps": 1, "exit": 1}], settle_s=0.0)
    assert pod.wait() == ExitCode.TRAINER_CRASHED
    assert not (pod.run_dir / "start-5.json").exists()
    assert pod.last_word()["reason"] == RunReason.RESTARTS_EXHAUSTED


# Hangs and their evidence


def failure_of(pod: Supervised) -> pb.Failure:
    return next(event.failure for event in pod.events() if event.WhichOneof("event") == "failure")


def kept(pod: Supervised) -> list[str]:
    return [path.read_text() for path in sorted((pod.checkpoints / "uid-1" / "a00001").glob("stacks-*.txt"))]


def test_a_quiet_trainer_is_replaced_long_before_the_heartbeat_timeout(pod: Supervised):
    """No CPU, no bytes, no beat: three of its steps and a second, though health allows a minute."""
    pod.start([{"steps": 150, "freeze": True}, {"from": 150, "steps": 5}])
    assert pod.wait() == 0
    failure = failure_of(pod)
    assert failure.reason == RunReason.HANG
    assert "and no sign of work after step 150" in failure.message
    assert "(stacks in a00001/stacks-1.txt)" in failure.message
    assert "in main" in failure.message
    [text] = kept(pod)
    assert "Python stacks:\nCurrent thread" in text
    assert "S (sleeping)" in text


def test_a_stopped_trainer_is_described_from_outside(pod: Supervised):
    pod.start([{"steps": 150, **STAY}, {"from": 150, "steps": 5}], health={"progressTimeoutSeconds": 600})
    first = pod.started(1)["pid"]
    pod.stepped(first, 100)
    os.kill(first, signal.SIGSTOP)
    assert pod.wait() == 0
    message = failure_of(pod).message
    assert "it wrote no Python stacks; seen from outside:" in message
    assert f"thread {first} " in message
    assert "T (stopped)" in message
    [text] = kept(pod)
    assert "none: it did not answer SIGUSR1" in text


def test_the_last_hang_is_kept_too(pod: Supervised):
    pod.start([{"steps": 0, "freeze": True}], health={"heartbeatTimeoutSeconds": 1})
    assert pod.wait() == ExitCode.HUNG
    assert len(kept(pod)) == 4, "the first step 0 counts as new"
    failures = [event.failure for event in pod.events() if event.WhichOneof("event") == "failure"]
    assert all("in main" in failure.message for failure in failures)


def test_metrics_of_the_trainer_are_served_and_forgotten_with_it(pod: Supervised):
    pod.start([STAY], settle_s=0.0)
    pod.stepped(pod.started(1)["pid"], 5)
    (pod.run_dir / paths.TRAINER_METRICS).write_text("esper_tolaria_current_loss 0.5\nesper_tolaria_torn")
    until_sync(lambda: pod.metric("current_loss") == 0.5, DEADLINE_S, "the trainer's metric")
    assert pod.metric("torn") is None
    kill_trainer(pod, 1)
    pod.started(2)
    assert pod.metric("current_loss") is None
    assert pod.metric("trainer_starts_total") == 2
