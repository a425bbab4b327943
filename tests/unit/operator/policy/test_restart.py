"""What a failed attempt leads to."""

import json
from datetime import timedelta

import pytest
from esper_leyline.exitcodes import ExitCode
from esper_operator.model import Ending, Plan
from esper_operator.testing.builders import Scene

from tests.support.scenes import condition, running


def outcome(scene: Scene) -> tuple[str | None, str]:
    plan = scene.plan()
    return (plan.outcome.ending if plan.outcome else None), plan.verdict.reason


@pytest.mark.parametrize(
    ("code", "ending", "reason"),
    [
        (0, Ending.SUCCEEDED, "Complete"),
        (1, Ending.RESTART, "ContainerDied"),
        (ExitCode.TRAINER_CRASHED, Ending.RESTART, "TrainerCrashed"),
        (ExitCode.USER_CODE, Ending.FAILED, "UserCodeError"),
        (ExitCode.NO_VALID_CHECKPOINT, Ending.RESTART, "NoValidCheckpoint"),
        (ExitCode.ROLLBACK_EXHAUSTED, Ending.FAILED, "RollbacksExhausted"),
        (ExitCode.CHECKPOINT_DIR, Ending.FAILED, "CheckpointDirUnusable"),
        (ExitCode.HALTED, Ending.HALTED, "Halted"),
        (ExitCode.HUNG, Ending.RESTART, "Hang"),
        (ExitCode.CONFIG, Ending.FAILED, "ConfigError"),
        (134, Ending.RESTART, "ContainerDied"),
        (137, Ending.RESTART, "ContainerDied"),
        (255, Ending.RESTART, "ContainerDied"),
    ],
)
def test_each_exit_code_has_one_meaning(code: int, ending: Ending, reason: str) -> None:
    assert outcome(running().failed(code)) == (ending, reason)


def test_a_drained_pod_is_its_jobs_business() -> None:
    scene = running().failed(143)
    assert outcome(scene)[0] is None
    assert scene.plan().deletions == ()
    scene = scene.reconciled()
    assert (scene.status["phase"], scene.status["restarts"]["total"]) == ("Restarting", 0)


@pytest.mark.parametrize("code", [1, 137, 143])
def test_a_disrupted_pod_is_its_jobs_business_whatever_its_code(code: int) -> None:
    assert outcome(running().failed(code, disrupted=True))[0] is None


def test_zero_is_success_whatever_the_kubelet_calls_it() -> None:
    assert outcome(running().failed(0, reason="OOMKilled"))[0] is Ending.SUCCEEDED


def test_out_of_memory_is_named() -> None:
    assert outcome(running().failed(137, reason="OOMKilled")) == (Ending.RESTART, "OutOfMemory")


def test_the_last_word_names_the_reason_and_the_message() -> None:
    word = json.dumps({"reason": "EntrypointNotFound", "message": "no module named nothing", "exitCode": 71})
    scene = running().failed(71, message=word).reconciled()
    assert scene.status["phase"] == "Failed"
    assert scene.status["reason"] == "EntrypointNotFound"
    assert scene.status["lastFailure"]["message"] == "no module named nothing"
    assert condition(scene, "Failed") == ("True", "EntrypointNotFound")
    assert condition(scene, "Complete") == ("False", "EntrypointNotFound")


@pytest.mark.parametrize("word", ["", "plain words", "[1, 2]", '{"reason": ["x"], "message": 5, "savedStep": -1}', "{"])
def test_a_last_word_of_any_shape_is_borne(word: str) -> None:
    assert outcome(running().failed(70, message=word)) == (Ending.RESTART, "TrainerCrashed")


def restarting(counted: int) -> Scene:
    scene = running(restart={"maxRestarts": 5, "initialBackoffSeconds": 4, "maxBackoffSeconds": 20})
    restarts = {"total": counted, "counted": counted, "inPlace": 0}
    return scene.having(status={**scene.status, "restarts": restarts})


@pytest.mark.parametrize(("counted", "delay"), [(0, 4), (1, 8), (2, 16), (3, 20), (4, 20)])
def test_the_backoff_doubles_up_to_its_limit(counted: int, delay: int) -> None:
    scene = restarting(counted).failed(70)
    plan = scene.plan()
    assert plan.outcome is not None
    assert plan.outcome.next_time == scene.now + timedelta(seconds=delay)
    assert plan.outcome.counted == counted + 1


def test_the_run_fails_when_restarts_are_used_up() -> None:
    scene = restarting(5).failed(70)
    assert outcome(scene) == (Ending.FAILED, "RestartsExhausted")
    assert "restart.maxRestarts" in scene.plan().verdict.message
    scene = scene.reconciled()
    assert (scene.status["phase"], scene.status["restarts"]["counted"]) == ("Failed", 5)


def test_max_restarts_of_zero_allows_none() -> None:
    assert outcome(running(restart={"maxRestarts": 0}).failed(70)) == (Ending.FAILED, "RestartsExhausted")


def test_healthy_time_forgives_earlier_restarts() -> None:
    assert restarting(5).later(3599).failed(70).plan().outcome.ending is Ending.FAILED
    plan = restarting(5).later(3601).failed(70).plan()
    assert (plan.outcome.ending, plan.outcome.counted) == (Ending.RESTART, 1)


def rule(action: str, *values: int) -> Scene:
    return running(restart={"exitCodes": [{"action": action, "values": list(values)}]})


@pytest.mark.parametrize(
    ("action", "code", "ending", "counted"),
    [
        ("Fail", 70, Ending.FAILED, 0),
        ("Halt", 70, Ending.HALTED, 0),
        ("Restart", 71, Ending.RESTART, 1),
        ("Rollback", 71, Ending.RESTART, 1),
        ("RestartUncounted", 70, Ending.RESTART, 0),
        ("Fail", 71, Ending.FAILED, 0),
    ],
)
def test_the_users_table_comes_first(action: str, code: int, ending: Ending, counted: int) -> None:
    plan = rule(action, code).failed(code).plan()
    assert plan.outcome is not None
    assert (plan.outcome.ending, plan.outcome.counted) == (ending, counted)


@pytest.mark.parametrize("code", [0, 75, 143])
def test_the_users_table_cannot_redefine_the_runtimes_own_codes(code: int) -> None:
    without, with_rule = running().failed(code).plan(), rule("Fail", code or 1).failed(code).plan()
    assert with_rule.verdict == without.verdict


def test_an_unmatched_rule_changes_nothing() -> None:
    assert outcome(rule("Fail", 3).failed(70)) == (Ending.RESTART, "TrainerCrashed")


def test_in_place_only_means_no_other_pod() -> None:
    assert outcome(running(restart={"strategy": "InPlace"}).failed(70)) == (Ending.FAILED, "TrainerCrashed")


def test_a_halt_by_the_users_table_rests_until_a_person_decides() -> None:
    scene = rule("Halt", 70).failed(70).reconciled()
    assert (scene.status["phase"], scene.status["halt"]["source"]) == ("Halted", "Runtime")
    assert scene.later(1000).change().changed is False
    assert scene.without_jobs().plan().job is None
    stopped = scene.stopped("Checkpoint").reconciled()
    assert (stopped.status["phase"], stopped.status["halt"]["source"]) == ("Halted", "Spec")
    resumed = stopped.stopped("None").reconciled().reconciled().without_jobs().reconciled()
    assert resumed.status["attempt"] == 2


def test_a_pod_that_vanished_by_force_is_a_counted_restart() -> None:
    scene = running().having(pods=()).with_job(1, failed="BackoffLimitExceeded")
    plan = scene.plan()
    assert (plan.outcome.ending, plan.verdict.reason, plan.outcome.counted) == (Ending.RESTART, "PodLost", 1)


@pytest.mark.parametrize(("counts", "counted"), [(False, 0), (True, 1)])
def test_a_disruption_that_the_job_does_not_cure_counts_only_if_wanted(counts: bool, counted: int) -> None:
    scene = running(restart={"disruptionsCount": counts}).failed(143, disrupted=True)
    plan = scene.with_job(1, failed="BackoffLimitExceeded").plan()
    assert (plan.verdict.reason, plan.outcome.counted) == ("PodDisrupted", counted)


def test_a_pod_evicted_before_its_trainer_ran_is_replaced() -> None:
    scene = running()
    pod = dict(scene.having(pods=()).with_pods(state="failed", disrupted=True).pods[0])
    assert outcome(scene.having(pods=(pod,)))[0] is None
    lost = dict(scene.having(pods=()).with_pods(state="failed").pods[0])
    assert outcome(scene.having(pods=(lost,))) == (Ending.RESTART, "PodLost")


def test_a_recorded_failure_is_not_recorded_again() -> None:
    scene = running().failed(70).reconciled()
    for _ in range(3):
        assert outcome(scene)[0] is None
        scene = scene.reconciled()
    assert scene.status["restarts"]["total"] == 1


def test_the_next_attempts_failure_is_counted_even_when_its_job_was_never_recorded() -> None:
    scene = running().failed(70).reconciled().later(10).without_jobs().with_job(2).with_pods(attempt=2).failed(70)
    plan: Plan = scene.plan()
    assert (plan.outcome.ending, plan.outcome.counted) == (Ending.RESTART, 2)
    scene = scene.reconciled()
    assert (scene.status["attempt"], scene.status["restarts"]["total"]) == (2, 2)
    assert scene.status["nextAttemptTime"] == "2026-03-01T12:00:21Z"
