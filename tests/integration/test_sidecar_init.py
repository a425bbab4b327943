"""PID 1 of a sidecar with real processes and signals."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import PATIENT_S

pytestmark = pytest.mark.timeout(180)

PRELUDE = """
import asyncio, os, signal, subprocess, sys
from pathlib import Path
from esper_runtime.sidecar.worker import run_worker
from esper_runtime.sidecar.environment import SettingsError
here = Path(os.environ["HERE"])
def note(line):
    with (here / "notes").open("a") as file:
        file.write(f"{line} {os.getpid()}\\n")
"""


class Sidecar:
    """`run_sidecar` in a process of its own, over a worker module written by the test."""

    def __init__(self, directory: Path, worker: str, stop_timeout_s: float = PATIENT_S) -> None:
        self.directory = directory
        (directory / "the_worker.py").write_text(PRELUDE + textwrap.dedent(worker))
        code = (
            "import sys; from esper_runtime.sidecar.init import run_sidecar;"
            f"sys.exit(run_sidecar('test', worker='the_worker', stop_timeout_s={stop_timeout_s}))"
        )
        environ = {**os.environ, "HERE": str(directory), "PYTHONPATH": str(directory), "ESPER_LOG_FORMAT": "json"}
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], env=environ, stderr=log, start_new_session=True
            )

    def notes(self, word: str) -> list[int]:
        """PIDs of the workers that noted `word`, in order."""
        path = self.directory / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(line.split()[1]) for line in lines if line.split()[0] == word]

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def wait_for(self, word: str, count: int = 1, timeout_s: float = PATIENT_S) -> list[int]:
        deadline = time.monotonic() + timeout_s
        while len(found := self.notes(word)) < count:
            assert time.monotonic() < deadline, f"{word} x{count} not seen: {self.log()}"
            time.sleep(0.01)
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    started = []

    def make(worker: str, **options) -> Sidecar:
        started.append(Sidecar(tmp_path, worker, **options))
        return started[-1]

    yield make
    for sidecar in started:
        sidecar.end()


PATIENT = """
async def serve(environment, stop):
    note("up")
    await stop.wait()
    note("stopped")
if __name__ == "__main__":
    sys.exit(run_worker("test", serve))
"""


def test_a_killed_worker_is_started_again_at_once(start):
    sidecar = start(PATIENT)
    [first] = sidecar.wait_for("up")
    os.kill(first, signal.SIGKILL)
    second = sidecar.wait_for("up", 2)[1]
    assert second != first
    assert "restart in 0.0 s" in sidecar.log()


def test_sigterm_is_passed_on_waited_for_and_ends_with_0(start):
    sidecar = start(PATIENT)
    [worker] = sidecar.wait_for("up")
    sidecar.process.terminate()
    assert sidecar.process.wait(PATIENT_S) == 0
    assert sidecar.notes("stopped") == [worker]


def test_a_stop_during_the_start_of_the_worker_is_not_lost(start):
    sidecar = start("import time; note('starting'); time.sleep(0.3)\n" + PATIENT)
    sidecar.wait_for("starting")
    sidecar.process.terminate()
    assert sidecar.process.wait(PATIENT_S) == 0
    assert len(sidecar.notes("stopped")) == 1


def test_a_worker_that_does_not_stop_is_killed_and_the_code_says_so(start):
    sidecar = start(
        """
        async def serve(environment, stop):
            note("up")
            await asyncio.Event().wait()
        if __name__ == "__main__":
            sys.exit(run_worker("test", serve))
        """,
        stop_timeout_s=0.2,
    )
    sidecar.wait_for("up")
    sidecar.process.terminate()
    assert sidecar.process.wait(PATIENT_S) == 137


def test_unusable_settings_end_the_container_with_78(start):
    sidecar = start(
        """
        async def serve(environment, stop):
            raise SettingsError("the key is missing")
        if __name__ == "__main__":
            sys.exit(run_worker("test", serve))
        """
    )
    assert sidecar.process.wait(PATIENT_S) == 78
    assert "the key is missing" in (sidecar.directory / "log").read_text()


def test_a_worker_that_keeps_crashing_is_restarted_ever_more_slowly(start):
    sidecar = start("note('up'); raise RuntimeError('broken')")
    sidecar.wait_for("up", 4)
    log = (sidecar.directory / "log").read_text()
    assert "restart in 0.0 s" in log
    assert "restart in 0.1 s" in log


def test_orphans_of_the_worker_are_reaped(start):
    sidecar = start(
        """
        async def serve(environment, stop):
            subprocess.run(["sh", "-c", "sleep 0.05 & echo $! > $HERE/orphan"], check=True)
            note("up")
            await stop.wait()
        if __name__ == "__main__":
            sys.exit(run_worker("test", serve))
        """
    )
    sidecar.wait_for("up")
    orphan = int((sidecar.directory / "orphan").read_text())
    deadline = time.monotonic() + PATIENT_S
    while psutil.pid_exists(orphan):
        assert time.monotonic() < deadline, psutil.Process(orphan).status()
        time.sleep(0.01)


def test_the_worker_ends_with_its_pid_1(start):
    sidecar = start(PATIENT)
    [worker] = sidecar.wait_for("up")
    sidecar.process.kill()
    sidecar.wait_for("stopped")
    deadline = time.monotonic() + PATIENT_S
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
