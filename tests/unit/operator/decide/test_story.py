"""The life of a run, as one reconcile after the other sees it."""

import pytest
from esper_leyline.v1.emergency_pb2 import EmergencyAck
from esper_leyline.v1.report_pb2 import Degradation, Recovery
from esper_operator.model import Applied
from esper_operator.testing.builders import a_run

from tests.support.scenes import condition, phases, running


def test_a_run_goes_from_pending_to_succeeded() -> None:
    scene = a_run().reconciled()
    assert scene.status["phase"] == "Pending"
    assert scene.jobs[0]["metadata"]["name"] == "digits-a1"
    scene = scene.with_pods(state="placed").reconciled()
    scene = scene.having(pods=()).with_pods().reconciled()
    scene = scene.later(1).reporting("RUNNING", step=1, moved=("STARTING", "RUNNING")).reconciled()
    scene = scene.later(9).reporting("RUNNING", step=999).failed(0).reconciled()
    assert phases(scene) == ["Pending", "Starting", "Running", "Succeeded"]
    assert condition(scene, "Complete") == ("True", "Complete")
    assert condition(scene, "Finished") == ("True", "Complete")
    assert scene.status["completionTime"] == "2026-03-01T12:00:10Z"


def test_the_first_write_has_everything_that_columns_show() -> None:
    status = a_run().reconciled().status
    assert len(status["conditions"]) == 10
    assert status["progress"] == {"epoch": 0, "step": 0, "percentage": 0, "metrics": []}
    assert (status["attempt"], status["rollbacks"]["total"], status["restarts"]["total"]) == (1, 0, 0)
    assert status["ranks"]["summary"] == "0/1"
    assert status["observedGeneration"] == 1
    assert {c["observedGeneration"] for c in status["conditions"]} == {1}


def test_a_rollback_that_nobody_watched_is_two_transitions_and_one_event() -> None:
    scene = running().later(1)
    recovery = Recovery(
        kind="RECOVERY_KIND_IN_PROCESS", cause="NonFiniteLoss", from_step=31, to_step=30, detect_ms=0.2, recover_ms=19.6
    )
    scene = scene.reporting("ROLLING_BACK", step=31, moved=("RUNNING", "ROLLING_BACK"), reason="NonFiniteLoss")
    scene = scene.later(0.02).reporting("ROLLING_BACK", step=30, recovery=recovery, counters={"rollbacks": 1})
    scene = scene.reporting("RUNNING", step=30, moved=("ROLLING_BACK", "RUNNING"), counters={"rollbacks": 1})
    change = scene.change()
    assert [str(event.reason) for event in change.events] == ["RolledBack"]
    assert change.urgent
    scene = scene.reconciled()
    first, second = scene.status["history"][-2:]
    assert (first["from"], first["to"], first["time"]) == ("Running", "RollingBack", "2026-03-01T12:00:02Z")
    assert (second["from"], second["to"], second["time"]) == ("RollingBack", "Running", "2026-03-01T12:00:02.020000Z")
    assert scene.status["lastRecovery"]["kind"] == "InProcess"
    assert scene.status["lastRecovery"]["recoverMilliseconds"] == 20
    assert scene.status["rollbacks"]["total"] == 1
    assert condition(scene, "RolledBack") == ("True", "RolledBack")


def test_the_tier_of_a_recovery_and_failed_restores_by_outcome_are_shown() -> None:
    recovery = Recovery(
        kind="RECOVERY_KIND_IN_PROCESS", cause="LossSpike", from_step=31, to_step=20, tier="ROLLBACK_TIER_FULL"
    )
    counters = {"rollbacks": 1, "restores_failed_integrity": 2, "restores_over_deadline": 1}
    scene = running().later(1)
    assert "restoreFailures" not in scene.status["rollbacks"]
    scene = scene.reporting("RUNNING", step=20, recovery=recovery, counters=counters).reconciled()
    assert scene.status["lastRecovery"]["tier"] == "Full"
    failures = scene.status["rollbacks"]["restoreFailures"]
    assert (failures["integrityFailed"], failures["deadlineExceeded"]) == (2, 1)
    assert (failures["noCheckpoint"], failures["applyFailed"]) == (0, 0)
    forgetful = scene.later(1).reporting("RUNNING", step=30, counters={"rollbacks": 1}).reconciled()
    assert forgetful.status["rollbacks"]["restoreFailures"] == failures, "totals never go back"


def test_a_crash_is_recorded_before_anything_is_deleted_and_then_tried_again() -> None:
    scene = running().later(1).failed(70, message='{"reason":"TrainerCrashed","message":"boom","step":20}')
    assert scene.plan().deletions == ()
    scene = scene.reconciled()
    assert scene.status["phase"] == "Restarting"
    failure = scene.status["lastFailure"]
    assert (failure["exitCode"], failure["containerName"], failure["message"]) == (70, "tolaria", "boom")
    assert failure["podName"] == scene.pods[0]["metadata"]["name"]
    assert scene.status["restarts"] == {"total": 1, "counted": 1, "inPlace": 0, "lastTime": "2026-03-01T12:00:02Z"}
    assert [d.name for d in scene.plan().deletions] == ["digits-a1"]
    scene = scene.reconciled()
    assert scene.plan().deletions == ()
    gone = scene.without_jobs()
    assert gone.plan().job is None
    assert gone.plan().requeue_after_s == 5
    scene = gone.later(5).reconciled()
    assert scene.status["attempt"] == 2
    assert scene.status["phase"] == "Restarting"
    assert "nextAttemptTime" not in scene.status
    recovery = Recovery(kind="RECOVERY_KIND_NEW_ATTEMPT", cause="PodLost", from_step=10, to_step=10)
    scene = scene.with_pods().reporting("STARTING", step=10, recovery=recovery)
    scene = scene.reporting("RUNNING", step=11, moved=("STARTING", "RUNNING")).reconciled()
    assert scene.status["lastRecovery"]["cause"] == "PodLost"
    assert scene.status["phase"] == "Running"
    assert phases(scene)[-2:] == ["Restarting", "Running"]


def test_checkpoint_halt_and_resume() -> None:
    scene = running().stopped("Checkpoint")
    order = scene.plan().signal
    assert order is not None
    assert (order.mode, order.attempt, order.clear) == ("Checkpoint", 1, False)
    scene = scene.reconciled()
    assert scene.status["phase"] == "Halting"
    pod = scene.pods[0]["metadata"]["name"]
    assert scene.status["halt"]["missing"] == [pod, f"{pod}/kasmina", f"{pod}/tamiyo"]
    assert scene.plan().signal is None
    scene = scene.acknowledging(participant="kasmina").reconciled()
    assert (scene.status["phase"], scene.status["halt"]["missing"]) == ("Halting", [pod, f"{pod}/tamiyo"])
    scene = scene.later(0.3).acknowledging(saved_step=23, step=23).reconciled()
    halt = scene.status["halt"]
    assert (halt["acknowledged"], halt["expected"], halt["savedStep"], halt["milliseconds"]) == (1, 1, 23, 300)
    assert (halt["id"], halt["mode"], halt["source"]) == (f"{1:032x}", "Checkpoint", "Spec")
    assert (scene.status["phase"], halt["missing"]) == ("Halted", [f"{pod}/tamiyo"])
    scene = scene.later(1).failed(75).reconciled()
    assert scene.status["halt"]["missing"] == [], "whoever has ended acts no more"
    assert scene.change().changed is False
    scene = scene.later(60).stopped("None").reconciled()
    assert scene.status["nextAttemptTime"] == "2026-03-01T12:01:02.300000Z"
    assert [d.name for d in scene.plan().deletions] == ["digits-a1"]
    scene = scene.reconciled().without_jobs().reconciled()
    assert scene.status["attempt"] == 2
    assert scene.status["restarts"]["total"] == 0
    assert scene.status["pausedSeconds"] == 61
    recovery = Recovery(kind="RECOVERY_KIND_NEW_ATTEMPT", cause="PodLost", from_step=23, to_step=23)
    scene = scene.with_pods().reporting("STARTING", step=23, recovery=recovery)
    scene = scene.reporting("RUNNING", step=24, moved=("STARTING", "RUNNING"))
    assert not any(event.warning for event in scene.change().events)
    scene = scene.reconciled()
    assert scene.status["lastRecovery"]["cause"] == "Resumed"  # no pod was lost, whatever the trainer thinks
    assert phases(scene)[-5:] == ["Running", "Halting", "Halted", "Pending", "Running"]
    assert condition(scene, "Halted") == ("False", "NotHalted")


def test_freeze_keeps_the_pod_and_goes_on_in_place() -> None:
    scene = running().stopped("Freeze").reconciled()
    scene = scene.reporting("FROZEN", step=21, moved=("RUNNING", "FROZEN")).acknowledging(phase="FROZEN", step=21)
    scene = scene.reconciled()
    assert (scene.status["phase"], scene.status["reason"]) == ("Halted", "Frozen")
    assert condition(scene, "Healthy")[0] == "True"
    still = scene.later(30).reporting("FROZEN", step=21).change()
    assert still.changed is False
    assert still.folded is not None
    scene = scene.later(60).stopped("None")
    order = scene.plan().signal
    assert order is not None
    assert (order.clear, order.signal_id) == (True, f"{1:032x}")
    scene = scene.reconciled()
    assert (scene.status["phase"], scene.status["reason"]) == ("Halted", "Frozen")
    scene = scene.later(0.2).reporting("RUNNING", step=21, moved=("FROZEN", "RUNNING"), reason="Resumed")
    assert [str(e.reason) for e in scene.change().events] == ["Resumed"]
    scene = scene.reconciled()
    assert (scene.status["phase"], scene.status["attempt"]) == ("Running", 1)


def test_suspend_releases_the_pods_and_resuming_is_the_next_attempt() -> None:
    scene = running().suspended()
    assert [d.name for d in scene.plan().deletions] == ["digits-a1"]
    scene = scene.reconciled()
    assert scene.status["phase"] == "Halting"
    scene = scene.later(3).without_jobs().reconciled()
    assert scene.status["phase"] == "Suspended"
    assert condition(scene, "Suspended") == ("True", "Suspended")
    scene = scene.later(3600).suspended(False).reconciled()
    assert scene.status["attempt"] == 2
    assert scene.status["restarts"]["total"] == 0
    assert condition(scene, "Suspended") == ("False", "NotSuspended")


def test_a_run_made_under_a_broadcast_starts_halted_and_starts_when_it_is_lifted() -> None:
    scene = a_run().broadcast("Checkpoint").reconciled()
    assert scene.status["phase"] == "Halted"
    assert scene.jobs == ()
    halt = scene.status["halt"]
    assert (halt["source"], halt["id"], halt["acknowledged"], halt["expected"]) == ("Broadcast", "fire", 0, 0)
    scene = scene.having(broadcasts=()).reconciled()
    assert scene.status["attempt"] == 1
    assert scene.status["phase"] == "Pending"


def test_clearing_one_halt_reveals_the_next() -> None:
    scene = running().broadcast("Freeze").stopped("Checkpoint")
    assert scene.plan().signal is not None
    assert scene.plan().signal.mode == "Checkpoint"
    halted = scene.reconciled().failed(75).reconciled()
    assert halted.status["halt"]["source"] == "Spec"
    revealed = halted.stopped("None").reconciled()
    assert revealed.status["phase"] == "Halted"
    assert (revealed.status["halt"]["source"], revealed.status["halt"]["mode"]) == ("Broadcast", "Freeze")
    assert revealed.having(broadcasts=()).reconciled().status["phase"] == "Pending"


def test_the_strongest_wins_and_the_spec_wins_between_equals() -> None:
    scene = running().stopped("Checkpoint").broadcast("Kill", "flood").broadcast("Checkpoint")
    assert scene.plan().signal.mode == "Kill"
    assert scene.plan().signal.source == "Broadcast"
    scene = running().stopped("Kill").broadcast("Kill")
    assert scene.plan().signal.source == "Spec"


def test_an_operator_killed_between_signal_and_status_does_not_send_it_twice() -> None:
    scene = running().stopped("Checkpoint").signalled("Checkpoint")
    assert scene.plan().signal is None
    status = scene.reconciled().status
    assert (status["phase"], status["halt"]["id"]) == ("Halting", f"{1:032x}")


def test_an_operator_killed_between_job_and_status_adopts_the_job() -> None:
    scene = a_run().with_job(1)
    assert scene.plan().job is None
    scene = scene.reconciled()
    assert (scene.status["attempt"], scene.status["jobName"]) == (1, "digits-a1")


def test_a_stale_cache_leads_to_the_same_job_again_and_not_to_another() -> None:
    scene = a_run().reconciled()
    plan = scene.without_jobs().plan()
    assert plan.attempt == 1
    assert plan.job is not None
    assert plan.job["metadata"]["name"] == "digits-a1"


def test_a_job_that_the_api_refuses_is_a_condition_and_no_attempt() -> None:
    scene = a_run().reconciled(Applied(refused="exceeded quota: jobs")).without_jobs()
    assert scene.status["attempt"] == 0
    assert condition(scene, "PodsReady") == ("False", "PodRefused")
    assert scene.status["reason"] == "PodRefused"
    assert scene.plan().requeue_after_s == 5
    assert scene.later(40).plan().requeue_after_s == 40
    assert scene.later(4000).plan().requeue_after_s == 300
    again = scene.later(5).change(Applied(refused="exceeded quota: jobs"))
    assert again.changed is False
    assert scene.later(5).reconciled().status["attempt"] == 1


@pytest.mark.parametrize("state", ["pending", "placed", "training"])
def test_a_finished_run_absorbs_everything(state: str) -> None:
    scene = running().failed(0).reconciled()
    for other in (scene.stopped("Kill"), scene.suspended(), scene.with_pods(state=state), scene.without_jobs()):
        assert other.change().changed is False
        assert other.plan().job is None


def test_reports_that_come_after_the_end_complete_the_figures() -> None:
    scene = running().failed(0).reconciled().later(1)
    scene = scene.reporting("SUCCEEDED", step=1000, checkpoint=1000, moved=("RUNNING", "SUCCEEDED"))
    scene = scene.reconciled()
    assert scene.status["phase"] == "Succeeded"
    assert scene.status["progress"]["percentage"] == 100
    assert scene.status["checkpoint"]["latestVerifiedStep"] == 1000
    assert phases(scene)[-1] == "Succeeded"
    assert scene.later(1).change().changed is False


def test_a_run_that_skipped_batches_is_complete_all_the_same() -> None:
    scene = running().reporting("RUNNING", step=1799, total=1800).reconciled()
    assert scene.status["progress"]["percentage"] == 99
    scene = scene.failed(0).reconciled()
    done = scene.status["progress"]
    assert (done["step"], done["percentage"], done["estimatedRemainingSeconds"]) == (1799, 100, 0)
    late = scene.later(1).reporting("SUCCEEDED", step=1799, total=1800, checkpoint=1799).reconciled()
    assert late.status["checkpoint"]["latestVerifiedStep"] == 1799
    assert late.status["progress"]["percentage"] == 100


def test_conservative_mode_is_a_condition_and_neither_trouble_nor_a_reason_to_be_running() -> None:
    careful = Degradation(component="tamiyo", degraded=True, reason="ConservativeMode", message="validation got worse")
    scene = running().reporting("RUNNING", step=30, degradations=[careful])
    assert scene.change().events == ()
    scene = scene.reconciled()
    assert condition(scene, "Healthy") == ("True", "ConservativeMode")
    assert scene.status["reason"] == "Training"
    assert scene.later(1).change().changed is False
    broken = Degradation(component="oona", degraded=True, reason="BusUnavailable", message="refused")
    both = scene.reporting("RUNNING", step=40, degradations=[careful, broken]).reconciled()
    assert condition(both, "Healthy") == ("False", "BusUnavailable")
    assert both.status["reason"] == "Training"
    scene = scene.reporting("RUNNING", step=50).reconciled()
    assert condition(scene, "Healthy") == ("True", "Training")


@pytest.mark.row("K42")
def test_a_worker_of_weatherlight_that_fails_is_in_the_condition_until_it_is_forgiven() -> None:
    failed = Degradation(component="weatherlight", degraded=True, reason="WorkerFailed", message="worker bus: x")
    scene = running().reporting("RUNNING", step=30, degradations=[failed]).reconciled()
    assert condition(scene, "Healthy") == ("False", "WorkerFailed")
    assert scene.status["phase"] == "Running"
    assert condition(scene.reporting("RUNNING", step=40).reconciled(), "Healthy") == ("True", "Training")


def test_what_the_server_refuses_is_named_by_its_own_kind() -> None:
    scene = a_run().reconciled(Applied(refused='Service digits: services "digits" is forbidden')).without_jobs()
    ready = next(c for c in scene.status["conditions"] if c["type"] == "PodsReady")
    assert ready["message"].startswith("the API server refused Service digits: ")
    assert scene.status["attempt"] == 0


def test_a_child_that_is_refused_later_does_not_hide_that_the_pods_are_ready() -> None:
    scene = running()
    change = scene.change(Applied(refused="ConfigMap digits-config: forbidden"))
    assert [str(event.reason) for event in change.events] == ["PodRefused"]
    scene = scene.reconciled(Applied(refused="ConfigMap digits-config: forbidden"))
    assert condition(scene, "PodsReady") == ("True", "PodsReady")
    assert condition(scene, "Healthy") == ("False", "PodRefused")
    assert scene.status["phase"] == "Running"
    assert condition(scene.reconciled(), "Healthy") == ("True", "Training")


def test_what_an_earlier_run_left_is_waited_for_in_silence() -> None:
    left = Applied(waiting="waiting until Service digits of the earlier run of this name is gone")
    scene = a_run()
    assert scene.change(left).events == ()
    scene = scene.reconciled(left).without_jobs()
    assert (scene.status["attempt"], scene.status["phase"], scene.status["reason"]) == (0, "Pending", "PodsPending")
    assert condition(scene, "PodsReady") == ("False", "PodsPending")
    assert scene.reconciled().status["attempt"] == 1


def test_a_halt_that_only_redis_had_when_its_operator_was_killed_is_known_by_its_answer() -> None:
    scene = running().stopped("Checkpoint")
    ack = EmergencyAck(
        version=1, signal_id="f" * 32, attempt=1, participant="tolaria", stage="ACK_STAGE_DONE", saved_step=23
    )
    scene = scene.reporting("HALTED", step=23, ack=ack).failed(75).reconciled()
    halt = scene.status["halt"]
    assert scene.status["phase"] == "Halted"
    assert (halt["id"], halt["acknowledged"], halt["expected"], halt["savedStep"]) == ("f" * 32, 1, 1, 23)
    other = EmergencyAck(version=1, signal_id="e" * 32, attempt=1, participant="tolaria", stage="ACK_STAGE_DONE")
    assert scene.reporting("HALTED", step=23, ack=other).reconciled().status["halt"]["id"] == "f" * 32


@pytest.mark.parametrize(
    ("previous", "lost"), [(0, False), ((1 << 32) + 2, False), ((1 << 32) + 3, True), ((1 << 32) + 8, True)]
)
def test_reports_count_as_lost_only_when_one_with_an_event_is_missing(previous: int, lost: bool) -> None:
    scene = running()
    assert scene.status["observedReport"] == {"attempt": 1, "seq": (1 << 32) + 2}
    scene = scene.reporting("RUNNING", step=90, seq=(1 << 32) + 9, previous_event_seq=previous)
    assert [event.reason == "ReportsLost" for event in scene.change().events] == [True] * lost
    assert scene.reconciled().status["progress"]["step"] == 90


def test_the_first_report_of_an_attempt_tells_what_went_before_it() -> None:
    again = running(2).reporting("RUNNING", step=90, attempt=3, seq=(1 << 32) + 2, previous_event_seq=(1 << 32) + 1)
    assert [str(e.reason) for e in again.with_job(3).change().events if e.reason == "ReportsLost"] == ["ReportsLost"]
