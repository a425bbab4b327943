"""Ending `esper run` by hand and by other commands, and going on."""

import contextlib
import os
import pty
import signal
import subprocess
import termios

import pytest

from tests.support.localruns import ESPER, paced, spec_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_signal_saves_and_the_same_command_goes_on_from_there(laptop):
    here = laptop(paced())
    process = here.run()
    saved = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        here.until_step(saved + 10)
        recovery = here.status().get("lastRecovery", {"toStep": 0, "cause": "Resumed"})
        assert (recovery["toStep"], recovery["cause"]) == (saved, "Resumed")
        process.send_signal(number)
        here.ended(130)
        stopped = here.status()
        saved = stopped["checkpoint"]["latestVerifiedStep"]
        assert saved == stopped["progress"]["step"]
        assert stopped["phase"] == "Suspended"
        assert "the same command again" in here.said()
        assert here.processes() == {}
        process = here.run()
        here.until(lambda at=saved: f"resuming from step {at}" in here.said(), "where it goes on")


def test_a_second_signal_does_not_wait_for_the_save(laptop):
    here = laptop(paced(pause_s=600))
    process = here.run()
    here.until(lambda: here.status().get("phase") == "Starting" and here.trainer(), "a trainer")
    here.until(lambda: "training starts" in here.esper("logs", "paced").stdout, "the first step")
    process.send_signal(signal.SIGINT)
    here.until(lambda: "Ctrl-C once more" in here.said(), "a word about a second Ctrl-C")
    process.send_signal(signal.SIGINT)
    here.ended(130)
    assert here.processes() == {}


def test_ctrl_c_while_it_starts(laptop):
    here = laptop(paced())
    process = here.run()
    here.until(lambda: "Ctrl-C saves" in here.said(), "the first word")
    process.send_signal(signal.SIGINT)
    here.ended(130)
    assert "Traceback" not in here.said()
    assert here.processes() == {}


def test_a_closed_terminal_saves(laptop):
    here = laptop(paced())
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [ESPER, "run", here.manifest], cwd=here.directory, stdin=slave, stdout=slave, stderr=slave,
        preexec_fn=lambda: (os.setsid(), os.environ.clear, _own_terminal()),
    )  # fmt: skip
    os.close(slave)
    try:
        shown = b""
        os.set_blocking(master, False)

        def trains() -> bool:
            nonlocal shown
            with contextlib.suppress(BlockingIOError):
                shown += os.read(master, 65536)
            return here.step() >= 20

        here.until(trains, "20 steps")
        assert b"PHASE" in shown
        os.close(master)
        process.wait(60)
        assert here.status()["phase"] == "Suspended"
        assert here.status()["checkpoint"]["latestVerifiedStep"] == here.step()
        assert here.processes() == {}
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _own_terminal() -> None:
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_halt_and_resume_from_another_process(laptop):
    here = laptop(paced())
    here.run()
    here.until_step(20)
    halted = here.esper("halt", "paced")
    assert halted.returncode == 0, halted.stderr
    here.ended(3)
    status = here.status()
    assert (status["phase"], status["halt"]["mode"], status["halt"]["acknowledged"]) == ("Halted", "Checkpoint", 1)
    saved = status["halt"]["savedStep"]
    assert saved == status["progress"]["step"] == status["checkpoint"]["latestVerifiedStep"]
    assert "esper resume paced" in here.said()
    process = here.spawn("resume", "paced")
    here.until_step(saved + 10)
    assert here.status()["lastRecovery"]["toStep"] == saved
    assert here.status()["restarts"]["total"] == 0
    killed = here.esper("halt", "paced", "--mode", "Kill")
    assert killed.returncode == 0, killed.stderr
    here.ended(3, process)
    assert here.status()["halt"]["mode"] == "Kill"
    assert here.processes() == {}


def test_freeze_keeps_the_pod_and_resume_goes_on_in_it(laptop):
    here = laptop(paced())
    here.run()
    here.until_step(20)
    trainer = here.trainer()
    assert here.esper("halt", "paced", "--mode", "Freeze").returncode == 0
    frozen = here.step()
    assert here.trainer() == trainer
    here.until(lambda: "Halted: `esper resume paced` in another terminal goes on" in here.said(), "the hint")
    listed = here.esper("list").stdout
    assert "Halted" in listed
    assert here.esper("resume", "paced").returncode == 0
    here.until_step(frozen + 10)
    assert here.trainer() == trainer
    assert here.status()["attempt"] == 1
    assert ("Halted", "Running") in here.moves()


def test_ctrl_c_while_frozen_saves(laptop):
    here = laptop(paced())
    process = here.run()
    here.until_step(20)
    assert here.esper("halt", "paced", "--mode", "Freeze").returncode == 0
    process.send_signal(signal.SIGINT)
    code = process.wait(100)
    assert code in (3, 130), here.said()
    assert here.status()["checkpoint"]["latestVerifiedStep"] == here.step()
    assert here.processes() == {}


def test_suspend_releases_the_pod_and_resume_goes_on(laptop):
    here = laptop(paced())
    process = here.run()
    here.until_step(20)
    assert here.esper("suspend", "paced").returncode == 0
    assert here.status()["phase"] == "Suspended"
    here.until(lambda: here.processes() == {}, "the end of the pod")
    here.until(lambda: "Suspended: `esper resume paced` in another terminal goes on" in here.said(), "the hint")
    saved = here.status()["checkpoint"]["latestVerifiedStep"]
    assert here.esper("resume", "paced").returncode == 0
    here.until_step(saved + 10)
    assert here.said().count("in another terminal") == 1
    assert process.poll() is None
    assert here.status()["lastRecovery"]["toStep"] == saved


def test_a_halt_with_nobody_there_waits_for_the_next_run(laptop):
    here = laptop(paced())
    process = here.run()
    here.until_step(5)
    process.send_signal(signal.SIGINT)
    here.ended(130)
    halted = here.esper("halt", "paced")
    assert halted.returncode == 0, halted.stderr
    assert "nothing drives this run" in halted.stderr
    assert here.resource()["spec"]["emergencyStop"] == "Checkpoint"
    here.run()  # the manifest says None
    here.until_step(here.step() + 5)


def test_a_run_whose_manifest_asks_for_a_halt_starts_nothing(laptop):
    documents = paced()
    spec_of(documents)["emergencyStop"] = "Kill"
    here = laptop(documents)
    here.run()
    here.ended(3)
    assert here.status()["phase"] == "Halted"
    assert not list(here.state.glob("logs/*/tolaria.log"))
