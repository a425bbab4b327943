"""Each policy at its edges; the way through them is in decide/test_story.py."""

import pytest
from esper_operator.decide import POLICIES, decide
from esper_operator.model import Ending, ResumeSource
from esper_operator.testing.builders import Scene, a_run

from tests.support.scenes import condition, running


def test_the_order_is_the_design() -> None:
    assert [policy.__name__ for policy in POLICIES] == [
        "managed_elsewhere", "being_deleted", "finished", "succeeded", "emergency", "suspended", "halted_by_runtime",
        "ended", "active_deadline", "stale_attempts", "not_accepted", "missing_job", "node_lost", "startup_deadline",
    ]  # fmt: skip


# --- ownership ---


def test_a_run_of_another_controller_is_not_touched() -> None:
    scene = a_run(managedBy="kueue.x-k8s.io/multikueue")
    assert scene.plan().verdict.reason == "ManagedElsewhere"
    assert scene.change().changed is False
    assert a_run(managedBy="esper.dev/operator").plan().job is not None


def test_a_run_on_its_way_out_is_left_to_the_garbage_collector() -> None:
    scene = running().having(deleting=True).failed(70)
    assert scene.plan().outcome is None
    assert scene.change().changed is False


# --- finished ---


def test_a_finished_run_is_deleted_when_its_time_to_live_is_over() -> None:
    scene = running(ttlSecondsAfterFinished=60).failed(0).reconciled()
    assert (scene.plan().deletions, scene.plan().requeue_after_s) == ((), 60)
    (deletion,) = scene.later(61).plan().deletions
    assert (deletion.kind, deletion.name, deletion.uid) == ("EsperTrainingRun", "digits", scene.uid)


def test_a_job_that_outlives_the_runs_failure_is_deleted_and_one_that_ended_is_kept_for_its_logs() -> None:
    overdue = running(activeDeadlineSeconds=100).later(200).reconciled()
    assert (overdue.status["phase"], overdue.status["reason"]) == ("Failed", "DeadlineExceeded")
    assert [d.name for d in overdue.plan().deletions] == ["digits-a1"]
    assert overdue.with_job(1, deleting=True).plan().deletions == ()
    crashed = running().failed(71).reconciled()
    assert crashed.plan().deletions == ()


def test_completion_beats_halt_suspend_and_deadline() -> None:
    scene = running(activeDeadlineSeconds=10).later(100).failed(0)
    for asked in (scene, scene.stopped("Kill"), scene.suspended()):
        assert asked.plan().outcome.ending is Ending.SUCCEEDED
    assert running().having(pods=()).with_job(1, complete=True).plan().outcome.ending is Ending.SUCCEEDED


# --- emergency ---


@pytest.mark.parametrize("mode", ["Checkpoint", "Kill"])
@pytest.mark.parametrize("state", ["pending", "placed"])
def test_a_pod_that_does_not_train_yet_has_nothing_to_save(mode: str, state: str) -> None:
    scene = a_run().reconciled().with_pods(state=state).stopped(mode)
    (deletion,) = scene.plan().deletions
    assert deletion.grace_seconds == (1 if mode == "Kill" else None)
    scene = scene.reconciled()
    assert (scene.status["phase"], scene.status["halt"]["expected"]) == ("Halted", 0)


def test_freeze_reaches_a_pod_that_does_not_train_yet_before_its_first_step() -> None:
    scene = a_run().reconciled().with_pods(state="placed").stopped("Freeze")
    assert scene.plan().signal is not None
    assert scene.plan().deletions == ()
    scene = scene.reconciled()
    assert scene.status["phase"] == "Halted"
    trained = scene.having(pods=()).with_pods().acknowledging(phase="FROZEN", step=1).reconciled()
    assert trained.status["phase"] == "Halted"
    assert (trained.status["halt"]["acknowledged"], trained.status["halt"]["expected"]) == (1, 1)


def test_the_runtimes_word_counts_where_the_kubelets_is_late() -> None:
    scene = running().having(pods=()).with_pods(state="placed").stopped("Checkpoint")
    assert scene.plan().signal is not None
    assert scene.plan().deletions == ()


@pytest.mark.parametrize(("mode", "grace"), [("Checkpoint", None), ("Kill", 1)])
def test_a_halt_without_an_answer_falls_back_on_sigterm(mode: str, grace: int | None) -> None:
    scene = running(emergency={"acknowledgeTimeoutSeconds": 15}).stopped(mode).reconciled()
    assert scene.later(14).plan().deletions == ()
    assert scene.later(14).plan().requeue_after_s == 1
    (deletion,) = scene.later(15).plan().deletions
    assert deletion.grace_seconds == grace


def test_a_halt_that_was_answered_gets_the_grace_period_to_end() -> None:
    scene = running(restart={"terminationGracePeriodSeconds": 60}).stopped("Checkpoint").reconciled()
    scene = scene.later(1).acknowledging("SEEN").reconciled()
    assert scene.status["phase"] == "Halting"
    assert scene.later(73).plan().deletions == ()
    assert len(scene.later(75).plan().deletions) == 1


def test_freeze_is_never_followed_by_a_deletion() -> None:
    scene = running().stopped("Freeze").reconciled()
    assert scene.later(10_000).plan().deletions == ()
    assert scene.later(10_000).reconciled().status["phase"] == "Halting"


def test_a_stronger_halt_replaces_a_weaker_one() -> None:
    scene = running().stopped("Freeze").reconciled().acknowledging(phase="FROZEN").reconciled()
    scene = scene.stopped("Kill")
    assert scene.plan().signal.mode == "Kill"
    scene = scene.reconciled()
    assert (scene.status["phase"], scene.status["halt"]["mode"]) == ("Halting", "Kill")
    assert scene.status["halt"]["acknowledged"] == 0
    late = scene.reporting("FROZEN", step=21).reconciled()
    assert late.status["phase"] == "Halting"


def test_the_record_of_a_halt_waits_for_its_status() -> None:
    scene = running().stopped("Checkpoint").signalled("Checkpoint")
    assert scene.later(1000).plan().deletions == ()


def test_a_halt_under_way_when_pods_are_still_ending() -> None:
    scene = running().suspended().reconciled().stopped("Checkpoint")
    assert scene.plan().verdict.reason == "HaltRequested"
    assert scene.plan().signal is None
    assert scene.reconciled().status["phase"] == "Halting"


def test_suspend_beats_freeze_and_checkpoint_beats_suspend() -> None:
    scene = running().suspended()
    frozen = scene.stopped("Freeze")
    assert frozen.plan().verdict.reason == "Suspended"
    assert frozen.plan().signal is None
    assert frozen.reconciled().without_jobs().reconciled().status["phase"] == "Suspended"
    saved = scene.stopped("Checkpoint")
    assert saved.plan().signal is not None
    ended = saved.reconciled().failed(75).reconciled()
    assert ended.status["phase"] == "Halted"
    assert condition(ended, "Suspended") == ("True", "Suspended")
    assert ended.stopped("None").plan().deletions[0].name == "digits-a1"


def test_a_halt_lifted_before_the_trainer_saw_it_changes_nothing() -> None:
    scene = running().stopped("Checkpoint").reconciled().stopped("None")
    assert scene.plan().signal.clear
    scene = scene.reconciled()
    assert scene.plan().signal is None
    scene = scene.reporting("RUNNING", step=30).reconciled()
    assert (scene.status["phase"], scene.status["attempt"]) == ("Running", 1)


def test_a_trainer_that_ended_though_the_halt_was_lifted_is_resumed() -> None:
    scene = running().stopped("Checkpoint").reconciled().stopped("None").reconciled().failed(75)
    assert scene.plan().outcome.ending is Ending.RESUME
    scene = scene.reconciled()
    assert "nextAttemptTime" in scene.status
    again = scene.reconciled().without_jobs().reconciled()
    assert (again.status["attempt"], again.status["restarts"]["total"]) == (2, 0)


def test_a_run_that_halts_itself_says_so_at_once_and_rests() -> None:
    scene = running().reporting("HALTING", step=30, moved=("RUNNING", "HALTING"), reason="RollbacksExhausted")
    scene = scene.reconciled()
    assert (scene.status["phase"], scene.status["halt"]["source"]) == ("Halting", "Runtime")
    assert scene.later(1).reconciled().status["phase"] == "Halting"
    scene = scene.failed(75, message='{"reason": "RollbacksExhausted", "message": "3 in a day", "savedStep": 30}')
    scene = scene.reconciled()
    assert (scene.status["phase"], scene.status["halt"]["savedStep"]) == ("Halted", 30)
    assert "lastFailure" not in scene.status
    assert scene.plan().outcome is None
    assert scene.reconciled().change().changed is False
    suspended = scene.suspended().reconciled().without_jobs().reconciled()
    assert suspended.status["phase"] == "Suspended"
    assert suspended.suspended(False).reconciled().status["attempt"] == 2


def test_exhausted_rollbacks_are_no_late_answer_to_a_lifted_halt() -> None:
    scene = running().signalled("Checkpoint", clear=True)
    assert scene.failed(75).plan().outcome.ending is Ending.RESUME
    assert scene.failed(75, message='{"reason": "RollbacksExhausted"}').plan().outcome.ending is Ending.HALTED


# --- ends ---


def test_a_failed_job_says_nothing_while_its_pod_is_told_to_live() -> None:
    """Jobs and pods are watched apart: the Job's end may arrive first, and only the pod's tells halted from crashed."""
    scene = running().with_job(1, failed="PodFailurePolicy")
    assert scene.plan().outcome is None
    assert scene.plan().job is None
    assert scene.failed(70).plan().outcome.ending is Ending.RESTART
    assert scene.failed(75).plan().outcome.ending is Ending.HALTED
    assert scene.having(pods=()).plan().outcome.failure.reason == "PodLost"


# --- deadlines ---


def test_time_at_rest_does_not_count_against_the_deadline() -> None:
    scene = running(activeDeadlineSeconds=100).stopped("Freeze").reconciled().acknowledging(phase="FROZEN").reconciled()
    assert scene.later(5000).plan().outcome is None
    scene = scene.later(5000).stopped("None").reconciled()
    assert scene.plan().outcome is None
    scene = scene.reporting("RUNNING", step=30, moved=("FROZEN", "RUNNING")).reconciled()
    assert scene.status["pausedSeconds"] == 5000
    assert scene.later(98).plan().outcome is None
    assert scene.later(100).plan().outcome.ending is Ending.FAILED


def test_a_start_that_leads_nowhere_is_a_failed_attempt() -> None:
    scene = a_run(startupDeadlineSeconds=60).reconciled().with_pods().reconciled()
    assert scene.plan().requeue_after_s == 60
    assert scene.later(59).plan().outcome is None
    plan = scene.later(60).plan()
    assert (plan.outcome.ending, plan.verdict.reason) == (Ending.RESTART, "StartupDeadlineExceeded")
    after = scene.later(60).reconciled()
    assert after.status["lastFailure"]["reason"] == "StartupDeadlineExceeded"
    assert len(after.plan().deletions) == 1


def test_waiting_for_a_node_is_no_start_that_leads_nowhere() -> None:
    scene = a_run(startupDeadlineSeconds=60).reconciled().with_pods(state="pending", unschedulable="no GPU")
    assert scene.reconciled().later(100_000).plan().outcome is None


def test_a_restart_in_place_is_no_start_that_leads_nowhere() -> None:
    scene = running(startupDeadlineSeconds=60).later(5000)
    scene = scene.reporting("RESTARTING", step=30, moved=("RUNNING", "RESTARTING"), reason="Hang").reconciled()
    assert scene.status["phase"] == "Restarting"
    assert condition(scene, "Healthy")[0] == "False"
    assert scene.plan().outcome is None


# --- stale attempts, start, acceptance ---


def test_older_pods_must_be_gone_even_when_their_job_is() -> None:
    scene = running().failed(70).reconciled().later(100)
    scene = scene.having(jobs=())
    assert scene.plan().job is None
    assert scene.plan().verdict.reason == "PodsPending"
    assert scene.having(pods=()).plan().job is not None


def test_a_pod_on_a_lost_node_is_waited_for_and_never_forced() -> None:
    scene = running().having(pods=()).with_pods(node_lost=True)
    plan = scene.plan()
    assert (plan.verdict.reason, plan.deletions, plan.outcome) == ("NodeLost", (), None)
    scene = scene.reconciled()
    assert condition(scene, "Recoverable") == ("False", "NodeLost")
    assert condition(scene, "Healthy") == ("False", "NodeLost")
    gone = scene.with_job(1, failed="BackoffLimitExceeded").reconciled()
    assert gone.status["phase"] == "Restarting"
    gone = gone.later(100)
    assert [d.grace_seconds for d in gone.plan().deletions] == [None]
    waiting = gone.reconciled()
    assert waiting.plan().job is None
    assert waiting.plan().verdict.reason == "NodeLost"
    back = waiting.without_jobs().reconciled()
    assert back.status["attempt"] == 2
    assert condition(back, "Recoverable") == ("True", "Recoverable")


def test_a_job_that_somebody_deleted_comes_back_under_its_own_number() -> None:
    scene = running().with_job(1, deleting=True)
    assert scene.plan().job is None
    assert scene.plan().deletions == ()
    assert scene.without_jobs().plan().attempt == 1


@pytest.mark.parametrize(
    ("scene", "reason", "poll"),
    [
        (a_run(workers={"count": 2}), "Unsupported", None),
        (a_run(runtime={}), "InvalidSpec", None),
        (a_run(faultInjection=[{"kind": "Crash", "step": 5}]), "FaultInjectionDisabled", None),
        (a_run().having(claim_user="team/other"), "CheckpointClaimInUse", 30),
    ],
)
def test_a_run_that_is_not_accepted_creates_nothing(scene: Scene, reason: str, poll: float | None) -> None:
    plan = scene.plan()
    assert (plan.job, plan.children, plan.verdict.reason, plan.requeue_after_s) == (None, (), reason, poll)
    scene = scene.reconciled()
    assert condition(scene, "Accepted") == ("False", reason)
    assert (scene.status["phase"], scene.status["reason"]) == ("Pending", reason)
    assert scene.change().changed is False


def test_a_source_to_resume_from_must_exist_only_at_the_start() -> None:
    checkpoint = {"storage": {"claimName": "shared"}, "everySteps": 5, "resumeFrom": {"runName": "before"}}
    scene = a_run(checkpoint=checkpoint)
    assert scene.plan().verdict.reason == "ResumeSourceNotFound"
    scene = scene.having(resume=ResumeSource(uid="uid-before", claim="before-checkpoints"))
    job = scene.plan().job
    assert job is not None
    pod = job["spec"]["template"]["spec"]
    assert {"name": "resume-from", "persistentVolumeClaim": {"claimName": "before-checkpoints"}} in pod["volumes"]
    assert {
        "name": "resume-from",
        "mountPath": "/checkpoints/uid-before",
        "subPath": "uid-before",
        "readOnly": True,
    } in pod["containers"][0]["volumeMounts"]
    assert all("resume-from" not in str(container) for container in pod["initContainers"])
    scene = scene.reconciled().having(resume=None)
    assert condition(scene.reconciled(), "Accepted") == ("True", "Accepted")


def test_a_spec_that_turns_bad_harms_no_job_that_lives() -> None:
    scene = running().edited(workers={"count": 0})
    plan = scene.plan()
    assert (plan.job, plan.children, plan.deletions) == (None, (), ())
    scene = scene.reconciled()
    assert (scene.status["phase"], condition(scene, "Accepted")) == ("Running", ("False", "InvalidSpec"))
    assert scene.stopped("Checkpoint").plan().signal is not None
    down = scene.failed(70).reconciled().later(100).without_jobs()
    assert down.plan().job is None
    assert down.edited(workers={"count": 1}).plan().job is not None


def test_a_forbidden_edit_is_refused_while_the_run_trains_and_taken_up_after_a_suspension() -> None:
    scene = running().edited(runtime={"entrypoint": "other.module:build"}).reconciled()
    assert condition(scene, "Accepted") == ("False", "ForbiddenEdit")
    assert scene.plan().children == ()
    assert scene.status["phase"] == "Running"
    scene = scene.suspended().reconciled().without_jobs().reconciled().suspended(False).reconciled()
    assert (scene.status["attempt"], condition(scene, "Accepted")) == (2, ("True", "Accepted"))
    assert condition(scene.reconciled(), "Accepted") == ("True", "Accepted")


def test_the_storage_never_changes() -> None:
    storage = {"storage": {"claimName": "another"}, "everySteps": 5}
    scene = running().edited(checkpoint=storage).suspended().reconciled().without_jobs().reconciled()
    scene = scene.suspended(False).reconciled()
    assert (scene.jobs, condition(scene, "Accepted")) == ((), ("False", "ForbiddenEdit"))


def test_a_pod_that_is_not_restricted_is_never_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from esper_operator import build

    def rogue(*args: object) -> dict[str, object]:
        manifest = original(*args)
        manifest["spec"]["template"]["spec"]["hostNetwork"] = True
        return manifest

    original = build.job
    monkeypatch.setattr(build, "job", rogue)
    scene = a_run().reconciled()
    assert scene.jobs == ()
    assert condition(scene, "Accepted") == ("False", "PodNotRestricted")


def test_the_first_job_comes_with_all_that_it_needs() -> None:
    plan = a_run().plan()
    assert next(c.manifest["kind"] for c in plan.children if c.create_only) == "Secret"
    assert {c.manifest["kind"] for c in plan.children} >= {"Secret", "ConfigMap", "Service", "PersistentVolumeClaim"}


# --- converged ---


def test_a_converged_run_wants_nothing() -> None:
    scene = running()
    plan = decide(scene.seen())
    assert (plan.job, plan.signal, plan.deletions, plan.touch_pods, plan.outcome) == (None, None, (), None, None)
    assert scene.change().changed is False


def test_a_changed_configuration_is_pushed_into_the_pods() -> None:
    fresh = a_run().plan().children
    config = next(c.manifest for c in fresh if c.manifest["metadata"]["name"] == "digits-config")
    digest = config["metadata"]["annotations"]["esper.dev/config-hash"]
    scene = running()
    assert scene.having(pods=()).with_pods(config_hash=digest).plan().touch_pods is None
    touched = scene.having(pods=()).with_pods(config_hash="old").plan()
    assert (touched.touch_pods, touched.verdict.reason) == (digest, "ConfigChanged")


def test_it_looks_again_when_reports_would_be_overdue() -> None:
    scene = running(health={"heartbeatTimeoutSeconds": 60}, activeDeadlineSeconds=5000).having(report_age_s=10)
    assert scene.plan().requeue_after_s == 50
    assert scene.having(report_age_s=70).plan().requeue_after_s == 4999
