"""Processes of containers: one process group each, its output in a file, and nothing of it left at the end.

A container is ended by its first process, as in a pod. What else it started is found by the pod's UID in its
environment, so that even a daemon in a session of its own does not outlive its pod. Linux only (/proc).
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from esper_leyline import env
from esper_leyline.paths import UMASK

KILLED_BY = 128
"""Exit code of a process that a signal ended: this plus the signal's number."""
_SWEEP_PATIENCE_S = 5.0


class Process:
    """The first process of a container."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(
        cls, command: Sequence[str], *, environment: Mapping[str, str], log: Path, directory: Path
    ) -> "Process":
        """Starts `command` in a session of its own; OSError when there is no such program."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=dict(environment),
                cwd=directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                umask=UMASK,
            )
        return cls(process)

    async def wait(self) -> int:
        """The exit code, 128 + n after signal n. What is left of the process group is killed."""
        code = await self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return code if code >= 0 else KILLED_BY - code

    def terminate(self) -> None:
        """SIGTERM to the first process alone, as the kubelet does."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def marked(variable: str, value: str) -> list[int]:
    """Living processes, this one apart, that have `variable` with this value in their environment."""
    mark = f"{variable}={value}\0".encode()
    found = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in found if pid != os.getpid() and _carries(pid, mark)]


def of_pod(pod_uid: str) -> list[int]:
    """Living processes of a pod."""
    return marked(env.POD_UID, pod_uid)


def carries(pid: int, pod_uid: str) -> bool:
    """Whether `pid` is still a process of the pod, and not a later one of the same number."""
    return _carries(pid, f"{env.POD_UID}={pod_uid}\0".encode())


def _carries(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return (b"\0" + mark) in b"\0" + file.read()
    except OSError:
        return False  # gone, a zombie, or another user's


def sweep(pod_uid: str) -> int:
    """Kills every process that the pod left behind; the number of those found."""
    return kill_marked(env.POD_UID, pod_uid)


def kill_marked(variable: str, value: str) -> int:
    """Kills marked() processes until none is left; the number of those found."""
    found: set[int] = set()
    give_up = time.monotonic() + _SWEEP_PATIENCE_S
    while (living := marked(variable, value)) and time.monotonic() < give_up:
        found.update(living)
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return len(found)
