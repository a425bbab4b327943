"""Real kasmina and tamiyo processes in a run directory of their own.

with tempfile.TemporaryDirectory(dir="/tmp") as directory:
    sidecars = Sidecars(Path(directory))       # keys and directories are made, nothing runs yet
    kasmina = sidecars.start("kasmina")        # PID 1 and worker; returns when /readyz says ok
    kasmina.worker().kill()                    # a psutil.Process
    sidecars.stop()
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
from esper_leyline import env, signing
from esper_leyline.signing import Role, SigningKey

from tests.support.waiting import PATIENT_S

RUN_UID = "3f0c2a7e-0000-4000-8000-000000000001"
SEED = bytes(range(32))


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENT_S) -> None:
    """Polls until `condition` holds; AssertionError with `what` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.005)


class Sidecar:
    """One sidecar container as a process: PID 1 with its worker below it."""

    def __init__(self, name: str, run_dir: Path, environ: dict[str, str], log: Path, *, module: str = "") -> None:
        self.name = name
        self.run_dir = run_dir
        self.socket = run_dir / f"{name}.sock"
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module or f"esper_runtime.{name}"],
                env=environ,
                stderr=stderr,
                start_new_session=True,
            )

    def worker(self) -> psutil.Process:
        """The worker process, once there is one."""
        wait_until(lambda: bool(psutil.Process(self.process.pid).children()), f"{self.name} has a worker")
        return psutil.Process(self.process.pid).children()[0]

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an HTTP GET; 0 when nothing listens."""
        try:
            port = int((self.run_dir / f"{self.name}.port").read_text())
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, ValueError):
            return 0, ""

    def metric(self, line: str) -> float:
        """Value of the metric whose line starts with `line` (name and labels)."""
        for candidate in self.get("/metrics")[1].splitlines():
            if candidate.startswith(line + " "):
                return float(candidate.rsplit(" ", 1)[1])
        raise AssertionError(f"{self.name} has no metric {line}")

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"{self.name} ended: {self.log.read_text()}"
            return self.get("/readyz")[0] == 200

        wait_until(ready, f"{self.name} is ready; log: {self.log.read_text()}")

    def freeze(self) -> None:
        self.worker().suspend()

    def thaw(self) -> None:
        self.worker().resume()

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        self.process.terminate()
        return self.process.wait(timeout=PATIENT_S)

    def kill(self) -> None:
        """The whole container at once, as the kernel or a kubelet would; returns when nothing of it is left."""
        everyone: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        psutil.wait_procs(everyone, timeout=PATIENT_S)


class Sidecars:
    """The run directory, keys and environment that kasmina and tamiyo share."""

    def __init__(self, directory: Path, *, run_uid: str = RUN_UID) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        self.run_uid = run_uid
        self.key = SigningKey.derive(SEED, run_uid, Role.TAMIYO)
        self._running: list[Sidecar] = []
        self.run_dir.mkdir()
        for container, items in {
            "kasmina": {signing.TAMIYO_PUBLIC: self.key.public_text()},
            "tamiyo": {signing.TAMIYO_PRIVATE: self.key.to_text()},
        }.items():
            (directory / "keys" / container).mkdir(parents=True)
            for name, text in items.items():
                (directory / "keys" / container / name).write_text(text)

    def environ(self, name: str) -> dict[str, str]:
        return {
            **os.environ,
            env.RUN_UID: self.run_uid,
            env.ATTEMPT: "1",
            env.RUN_DIR: str(self.run_dir),
            env.KEYS_DIR: str(self.directory / "keys" / name),
            env.HTTP_PORT: "0",
            env.LOG_FORMAT: "text",
        }

    def start(self, name: str, *, ready: bool = True) -> Sidecar:
        sidecar = Sidecar(name, self.run_dir, self.environ(name), self.directory / f"{name}.log")
        self._running.append(sidecar)
        if ready:
            sidecar.wait_ready()
        return sidecar

    def stop(self) -> None:
        for sidecar in self._running:
            sidecar.kill()
