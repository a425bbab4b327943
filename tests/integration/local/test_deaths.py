"""SIGKILL to each process of a local run: training survives, and the status says what happened."""

import os
import signal

import pytest
from esper_leyline import labels

from tests.support.localruns import paced

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_killed_trainer_goes_on_from_memory_in_the_same_pod(laptop):
    here = laptop(paced())
    here.run()
    here.until_step(20)
    pod, before = here.supervisor(), here.step()
    os.kill(here.trainer(), signal.SIGKILL)
    here.until(lambda: here.status().get("restarts", {}).get("inPlace") == 1, "a restart in place")
    here.until_step(before + 20)
    status = here.status()
    recovery = status["lastRecovery"]
    assert (recovery["kind"], recovery["cause"]) == ("InPlace", "TrainerKilled")
    assert recovery["toStep"] >= before - 5
    assert here.supervisor() == pod
    assert (status["attempt"], status["restarts"]["total"]) == (1, 1)
    failure = status["lastFailure"]
    assert (failure["exitCode"], failure["containerName"]) == (137, "tolaria")
    assert failure["podName"].startswith("paced-a1-0-")
    assert here.moves()[-2:] == [("Running", "Restarting"), ("Restarting", "Running")]


def test_a_killed_pod_is_followed_by_an_attempt_from_the_newest_checkpoint(laptop):
    here = laptop(paced())
    here.run()
    here.until_step(20)
    saved = here.until(lambda: here.status()["checkpoint"].get("latestVerifiedStep"), "a verified checkpoint")
    trainer = here.trainer()
    os.kill(here.supervisor(), signal.SIGKILL)
    here.until_gone(trainer)
    here.until(lambda: here.status()["attempt"] == 2 and here.status()["phase"] == "Running", "attempt 2 trains")
    status = here.status()
    assert status["lastRecovery"]["kind"] == "NewAttempt"
    assert status["lastRecovery"]["toStep"] >= saved
    assert status["progress"]["step"] >= saved
    assert (status["restarts"]["total"], status["restarts"]["counted"]) == (1, 1)
    assert (status["lastFailure"]["containerName"], status["lastFailure"]["exitCode"]) == ("tolaria", 137)


def test_training_goes_on_without_each_sidecar(laptop):
    here = laptop(paced())
    here.run()
    here.until_step(5)
    trainer = here.trainer()
    for name in labels.SIDECARS:
        before = here.step()
        worker = kill(here, f"esper_runtime.{name}.worker")
        container = kill(here, f"esper_runtime.{name}")
        here.until(lambda n=name: n in unhealthy(here), f"a word about {name}")
        here.until(lambda: unhealthy(here) == "", "health again")
        assert {worker, container}.isdisjoint(here.processes())
        assert here.until_step(before + 20)
    assert here.trainer() == trainer
    assert (here.status()["restarts"]["total"], here.status()["phase"]) == (0, "Running")


def kill(here, module):
    """Kills the process of `module`, and waits until another one has taken its place."""
    old = here.only(module)
    os.kill(old, signal.SIGKILL)
    here.until(lambda: (found := here.pids(module)) and old not in found, f"another {module}")
    return old


def unhealthy(here):
    """What condition Healthy says while it is not True."""
    healthy = here.condition("Healthy")
    return "" if healthy["status"] == "True" else healthy["message"]


def test_a_halt_arrives_without_valkey(laptop):
    here = laptop(paced())
    here.run()
    here.until_step(5)
    guard, valkey = here.guard(), here.valkey()
    os.kill(guard, signal.SIGSTOP)  # it would bring Valkey back in the middle of the test
    os.kill(valkey, signal.SIGKILL)
    halted = here.esper("halt", "paced", "--mode", "Freeze")
    assert halted.returncode == 0, halted.stderr
    assert "1/1 acknowledged" in halted.stderr
    os.kill(guard, signal.SIGCONT)
    here.until(lambda: "it does not answer" in here.said(), "a word about Redis")
    here.until(lambda: here.valkey() != valkey, "another Valkey")
    resumed = here.esper("resume", "paced")
    assert resumed.returncode == 0, resumed.stderr
    here.until_step(here.step() + 20)


def test_a_killed_esper_run_leaves_nothing_behind_and_loses_nothing(laptop):
    here = laptop(paced())
    first = here.run()
    before = here.until_step(30)
    pids, scratch = list(here.processes()), here.scratch()
    first.kill()
    first.wait()
    for pid in pids:
        here.until_gone(pid)
    here.until(lambda: not any(directory.exists() for directory in scratch), "clean directories")
    assert here.esper("status", "paced").returncode == 0
    here.run()
    here.until_step(before + 20)
    status = here.status()
    assert status["attempt"] == 2
    assert status["lastRecovery"]["toStep"] >= before
    assert status["lastRecovery"]["cause"] == "PodLost"
    assert status["restarts"]["total"] == 0  # nothing of the run's own failed
    assert here.said().startswith("paced: resuming; ")


def test_a_killed_guard_is_replaced(laptop):
    here = laptop(paced())
    first = here.run()
    here.until_step(5)
    guard = here.guard()
    os.kill(guard, signal.SIGKILL)
    here.until(lambda: (found := here.guards()) and guard not in found and found, "another guard")
    here.until_step(here.step() + 20)
    pids = list(here.processes())
    first.kill()
    first.wait()
    for pid in pids:
        here.until_gone(pid)


def test_processes_that_nobody_guards_are_ended_by_the_next_run(laptop):
    here = laptop(paced())
    first = here.run()
    before = here.until_step(30)
    scratch = here.scratch()
    os.kill(here.guard(), signal.SIGKILL)
    first.kill()
    first.wait()
    assert all(directory.is_dir() for directory in scratch)
    old = here.trainer()
    here.run()
    here.until_gone(old)
    here.until(lambda: here.status().get("lastRecovery"), "the recovery")  # the old trainer may have gone far ahead
    here.until_step(here.status()["lastRecovery"]["toStep"] + 20)
    assert here.status()["lastRecovery"]["toStep"] >= before
    assert not any(directory.exists() for directory in scratch)
