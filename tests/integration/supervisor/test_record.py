"""What the supervisor knows is in the run's record, whatever dies next. The trainer is a small one that writes none."""

import os
import re
import signal
import time
from typing import Any

import pytest
from esper_leyline import env
from esper_leyline.exitcodes import ExitCode
from esper_leyline.incidents import FIELD, incident_at
from esper_leyline.pages import EmergencyRecord
from esper_leyline.reasons import RunReason
from esper_leyline.v1.emergency_pb2 import EMERGENCY_MODE_KILL
from esper_runtime.checkpoint import Wal

from tests.support.supervised import DEADLINE_S, Supervised
from tests.support.waiting import until_sync

STAY = {"stay": True}
FAILED, TRANSITION, ENDED = "tolaria.trainer.failed", "tolaria.transition", "tolaria.trainer.ended"
pytestmark = pytest.mark.timeout(180)


def named(pod: Supervised, event: str) -> list[dict[str, Any]]:
    return [line for line in pod.record() if line["event"] == event]


def events(pod: Supervised) -> list[str]:
    return [line["event"] for line in pod.record()]


def test_a_killed_trainer_is_told_with_its_step_and_the_restart_in_place(pod: Supervised):
    pod.start([{"steps": 10, **STAY}, {"from": 10, "steps": 5}])
    first = pod.started(1)["pid"]
    pod.stepped(first, 10)
    os.kill(first, signal.SIGKILL)
    assert pod.wait() == 0
    died, moved = pod.record()
    assert (died["event"], died["level"], died["step"]) == (FAILED, "ERROR", 10)
    assert died["fields"] == {
        "reason": "TrainerKilled", "message": "trainer was ended by SIGKILL at step 10", "exitCode": 137,
        FIELD: incident_at("uid-1", 1, 0, 1, 1),
    }  # fmt: skip
    assert (moved["event"], moved["fields"]["from"], moved["fields"]["to"]) == (TRANSITION, "Running", "Restarting")
    assert moved["fields"][FIELD] == died["fields"][FIELD]
    assert [line["id"] for line in (died, moved)] == ["1.1.0.1", "1.1.0.2"]
    assert re.search(r"TrainerKilled +137 +10 +trainer was ended by SIGKILL at step 10", pod.report())
    assert "0 trainer processes" in pod.report(), "the supervisor is none"


def test_a_crash_is_told_in_the_trainer_s_own_words(pod: Supervised):
    word = {"reason": "TrainerCrashed", "message": "ValueError: no such luck", "exitCode": 1, "step": 6}
    pod.start([{"steps": 6, "exit": 1, "last_word": word}, {"from": 6, "steps": 2}])
    assert pod.wait() == 0
    [died] = named(pod, FAILED)
    assert died["fields"]["message"] == "trainer exited with 1 at step 6\nValueError: no such luck"


def test_a_hang_is_told_with_its_verdict_and_where_the_stacks_are(pod: Supervised):
    pod.start([{"freeze": True}, {"from": 5, "steps": 4}], health={"heartbeatTimeoutSeconds": 1})
    assert pod.wait() == 0
    [died] = named(pod, FAILED)
    assert (died["fields"]["reason"], died["fields"]["evidence"]) == ("Hang", "a00001/stacks-1.txt")
    assert "no heartbeat for 1 s (health.heartbeatTimeoutSeconds) at step 5" in died["fields"]["message"]
    assert (pod.checkpoints / "uid-1" / died["fields"]["evidence"]).is_file()
    assert re.search(
        r"Hang +137 +5 +trainer was ended by SIGKILL \(hung\) at step 5 +a00001/stacks-1.txt", pod.report()
    )


def test_the_last_crash_and_the_end_are_told_when_restarts_are_used_up(pod: Supervised):
    word = {"reason": "TrainerCrashed", "message": "no such luck", "exitCode": 1, "savedStep": 4}
    pod.start([{"steps": 6, "exit": 1}, {"from": 4, "steps": 1, "exit": 1, "last_word": word}])
    assert pod.wait() == ExitCode.TRAINER_CRASHED
    assert events(pod) == [FAILED, TRANSITION] * 3 + [FAILED, "tolaria.run.failed", TRANSITION, ENDED]
    *_, died, failed, moved, ended = pod.record()
    assert (died["step"], died["fields"]["exitCode"]) == (5, 1)
    assert "no such luck" in died["fields"]["message"]
    assert (failed["level"], failed["fields"]["reason"]) == ("CRITICAL", RunReason.RESTARTS_EXHAUSTED)
    assert failed["fields"]["exitCode"] == ExitCode.TRAINER_CRASHED
    assert moved["fields"]["to"] == "Failed"
    assert ended["fields"]["savedStep"] == 4
    assert "End:          RestartsExhausted (70) trainer exited with 1; 3 starts in a row" in pod.report()
    assert len(re.findall(r"TrainerCrashed +1 +[56] +trainer exited with 1 at step", pod.report())) == 4


def test_starts_that_the_system_refused_are_told_and_have_no_exit_code(pod: Supervised):
    pod.refuse(starts=3)
    pod.start()
    assert pod.wait() == ExitCode.TRAINER_CRASHED
    assert events(pod) == [FAILED, FAILED, FAILED, "tolaria.run.failed", TRANSITION, ENDED]
    for line in named(pod, FAILED):
        assert line["fields"].keys() == {"reason", "message"}
        assert line["fields"]["message"].startswith("trainer could not be started: [Errno 11]")
    assert "Restarting" not in pod.report(), "the run never left its first phase"


def test_what_is_told_while_a_trainer_lives_waits_until_it_does_not(pod: Supervised):
    pod.environ["FAKE_WARM"] = "fail"
    pod.start([STAY, {"from": 5, "steps": 3}], settle_s=0.0, spare_limit_s=0.01)
    first = pod.started(1)["pid"]
    until_sync(lambda: any(event.HasField("notice") for event in pod.events()), DEADLINE_S, "a notice")
    pod.stepped(first, 5)
    assert pod.record() == [], "the trainer's file is its own"
    os.kill(first, signal.SIGKILL)
    assert pod.wait() == 0
    notice, died, _ = pod.record()
    assert (notice["event"], notice["fields"]["reason"]) == ("tolaria.notice", RunReason.SPARE_UNAVAILABLE)
    assert notice["time"] < died["time"]


def test_an_emergency_stop_and_its_acknowledgement_are_told(pod: Supervised):
    pod.start([STAY])
    pod.stepped(pod.started(1)["pid"], 5)
    order = EmergencyRecord(
        term=1, seq=1, mode=EMERGENCY_MODE_KILL, clear=False, attempt=0, signal_id="ab" * 16,
        arrived_ns=time.monotonic_ns(), source=1,
    )  # fmt: skip
    pod.halt(order)
    assert pod.wait() == ExitCode.HALTED
    acknowledged = "tolaria.emergency.acknowledged"
    assert events(pod) == [acknowledged, acknowledged, "tolaria.emergency.halt", ENDED]
    assert "End:          EmergencyStop (75)" in pod.report()


def test_a_trainer_killed_for_its_slow_drain_is_a_drain(pod: Supervised):
    pod.environ[env.GRACE_SECONDS] = "3"
    pod.start([{**STAY, "drain_s": None}])
    pod.stepped(pod.started(1)["pid"], 3)
    pod.signal(signal.SIGTERM)
    assert pod.wait() == ExitCode.DRAINED
    assert events(pod) == [TRANSITION, ENDED]
    assert "End:          Drained (143) trainer was ended by SIGKILL after SIGTERM" in pod.report()


def test_ends_that_the_trainer_tells_itself_are_not_told_again(pod: Supervised):
    for code in (ExitCode.COMPLETE, ExitCode.DRAINED, ExitCode.HALTED):
        pod.start([{"steps": 1, "exit": code}])
        assert pod.wait() == code
    assert pod.record() == []


def test_a_volume_that_takes_no_line_costs_the_line_and_nothing_else(pod: Supervised):
    (pod.checkpoints / "uid-1").mkdir()
    (pod.checkpoints / "uid-1" / "record.jsonl").mkdir()
    pod.start([{"steps": 2, "exit": 1}, {"from": 2, "steps": 2}])
    assert pod.wait() == 0
    assert [event.WhichOneof("event") for event in pod.events()] == ["boot", "failure", "transition"]


# The container is killed in between

KILL = """
from esper_runtime.tolaria import record
from esper_runtime.tolaria.supervisor import events, lines, totals
def die(*_, **__):
    os.kill(os.getpid(), 9)
"""
PLACES = {
    "before the line": "lines.Lines.write = die",
    "within the line": "record.Sink._write = lambda s, text: (s._open(), os.write(s._descriptor, text[:-9]), die())",
    "before the log": "totals.Totals.add_restart = die",
    "before the journal": "events.Events.failure = die",
    "before the start": "start = loop.Supervisor._start\n"
    "loop.Supervisor._start = lambda s, recovery: die() if recovery else start(s, recovery)",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_container_killed_in_between_loses_at_most_what_nobody_else_was_told(pod: Supervised, place: str):
    plans = [{"steps": 6, "exit": 1}, {"from": 6, "steps": 2}]
    pod.prelude = KILL + PLACES[place]
    pod.start(plans)
    assert pod.wait() == -signal.SIGKILL
    told = "failure" in [event.WhichOneof("event") for event in pod.events()]
    counted = Wal(pod.checkpoints / "uid-1" / "wal.log").replay().in_place_restarts
    before = len(named(pod, FAILED))
    assert before == (not place.endswith("the line"))
    assert before >= max(told, counted)
    pod.prelude = ""
    pod.start(plans)
    assert pod.wait() == 0
    died = named(pod, FAILED)
    assert [line["incarnation"] for line in died] == [1] * before + [2]
    identities = [line["id"] for line in pod.record()]
    assert len(identities) == len(set(identities))
