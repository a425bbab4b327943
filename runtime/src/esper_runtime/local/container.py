"""One container of a pod: starts, probes, restarts and ends its process, and tells it as the kubelet would."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_runtime.local.probe import Probe, answers, until_answers
from esper_runtime.local.process import Process
from esper_runtime.local.state import now_text

MAX_MESSAGE = 4096
"""Bytes of a termination message, as in the kubelet."""
CANNOT_START = 128
"""Exit code of a container whose program could not be started."""
READINESS_PERIOD_S = 0.5
"""Readiness is asked for more often than a manifest says: it is shown in a live table."""
_HEALTHY_AFTER_S = 10.0
_BACKOFF_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerSpec:
    """A container, ready to be started."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    directory: Path
    termination_log: Path
    restart: bool
    """A native sidecar: it starts again whenever it ends."""
    startup: Probe | None = None
    readiness: Probe | None = None
    liveness: Probe | None = None


class Container:
    """The life of one container. `status()` is a Kubernetes containerStatus."""

    def __init__(self, spec: ContainerSpec, *, port: Callable[[], int | None], changed: Callable[[], None]) -> None:
        self.spec = spec
        self.started = asyncio.Event()
        """Its startup probe answered; without one, its process runs."""
        self.ready = False
        self.exit_code: int | None = None
        """Of a container that will not start again."""
        self._port = port
        self._changed = changed
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        """No process of it lives."""
        self._idle.set()
        self._restarts = 0
        self._state: dict[str, Any] = {"waiting": {"reason": "PodInitializing"}}
        self._last_state: dict[str, Any] = {}

    @property
    def pid(self) -> int | None:
        """The first process, while it lives."""
        return None if self._process is None else self._process.pid

    def status(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "ready": self.ready,
            "started": self.started.is_set(),
            "restartCount": self._restarts,
            "state": self._state,
            "lastState": self._last_state,
        }

    async def run(self) -> None:
        """Until the container has ended for good: by itself, or by stop()."""
        quick_deaths = 0
        while True:
            began = asyncio.get_running_loop().time()
            code = await self._run_once()
            if self._stopping.is_set() or not self.spec.restart:
                self.exit_code = code
                self._changed()
                return
            healthy = asyncio.get_running_loop().time() - began > _HEALTHY_AFTER_S
            quick_deaths = 0 if healthy else quick_deaths + 1
            delay_s = _BACKOFF_S[min(quick_deaths, len(_BACKOFF_S) - 1)]
            self._last_state, self._state = self._state, {"waiting": {"reason": "CrashLoopBackOff"}}
            self._restarts += 1
            self._changed()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
                self.exit_code = code
                return

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after the grace; returns when the process is gone."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        if grace_s <= 0:
            process.kill()
        else:
            process.terminate()
        try:
            await asyncio.wait_for(self._idle.wait(), max(grace_s, 0.01))
        except TimeoutError:
            process.kill()
            await self._idle.wait()

    def kill(self) -> None:
        """SIGKILL at once; whoever waits for its end goes on."""
        self._stopping.set()
        if self._process is not None:
            self._process.kill()

    async def _run_once(self) -> int:
        self.started.clear()
        self.spec.termination_log.parent.mkdir(parents=True, exist_ok=True)
        self.spec.termination_log.write_bytes(b"")
        began = now_text()
        try:
            process = await Process.start(
                self.spec.command,
                environment=self.spec.environment,
                log=self.spec.log,
                directory=self.spec.directory,
            )
        except OSError as error:
            return self._ended(CANNOT_START, began, message=f"{self.spec.command[0]}: {error.strerror}")
        self._process = process
        self._idle.clear()
        if self._stopping.is_set():
            process.kill()  # it was stopped while it started
        self._state = {"running": {"startedAt": began}}
        if self.spec.startup is None:
            self.started.set()
        self.ready = self.spec.startup is None and self.spec.readiness is None
        self._changed()
        probing = asyncio.create_task(self._probe(process))
        try:
            code = await process.wait()
        finally:
            probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await probing
        self._process = None
        self._idle.set()
        return self._ended(code, began)

    def _ended(self, code: int, began: str, *, message: str = "") -> int:
        self.ready = False
        word = self.spec.termination_log.read_bytes()[-MAX_MESSAGE:].decode(errors="replace")
        self._state = {
            "terminated": {
                "exitCode": code,
                "reason": "Completed" if code == 0 else "Error",
                "message": message or word,
                "startedAt": began,
                "finishedAt": now_text(),
            }
        }
        self._changed()
        return code

    async def _probe(self, process: Process) -> None:
        """Readiness by its probe; a failed startup or liveness probe kills the process."""
        if self.spec.startup is not None:
            if not await until_answers(self._port, self.spec.startup):
                process.kill()
                return
            self.started.set()
            self.ready = True
            self._changed()
        await asyncio.gather(self._watch_readiness(), self._watch_liveness(process))

    async def _watch_readiness(self) -> None:
        while (probe := self.spec.readiness) is not None:
            ready = await answers(self._port(), probe)
            if ready != self.ready:
                self.ready = ready
                self._changed()
            await asyncio.sleep(READINESS_PERIOD_S)

    async def _watch_liveness(self, process: Process) -> None:
        failures = 0
        while (probe := self.spec.liveness) is not None and failures < probe.failure_threshold:
            await asyncio.sleep(probe.period_s)
            # A container without a port yet has not come as far as to be judged.
            alive = self._port() is None or await answers(self._port(), probe)
            failures = 0 if alive else failures + 1
        if self.spec.liveness is not None:
            process.kill()
