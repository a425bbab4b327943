"""A pod's directories around a weatherlight, and what the other side of each of its interfaces would do.

Used by unit tests (parts in this process) and integration tests (`PodFiles.start`: the real sidecar as a process).
"""

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from esper_leyline import env, paths, signing
from esper_leyline.journal import JournalWriter
from esper_leyline.pages import EmergencyRecord, Heartbeat, Page, PageError
from esper_leyline.signing import Role, SigningKey, Verifier
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType, MessagePriority
from esper_leyline.v1.emergency_pb2 import EmergencyLevel, EmergencyMode, EmergencySignal, EmergencySource
from esper_leyline.v1.report_pb2 import Boot, ReportBatch, RunReport, RuntimeEvent, RuntimePhase, Transition
from esper_runtime.weatherlight.clock import Moment
from esper_runtime.weatherlight.reports import Identity

from tests.support.waiting import PATIENT_S

SEED = bytes(range(32))
UID = "3b1e9a52-6f0c-4c7f-9a51-0d1f1b5c8e11"
RUNNING = RuntimePhase.RUNTIME_PHASE_RUNNING
FREEZE = EmergencyMode.EMERGENCY_MODE_FREEZE

IDENTITY = Identity(run_uid=UID, run="team/digits", attempt=1, rank=0, pod_name="digits-a1-0", node_name="node-1")


def operator_key(run_uid: str = UID) -> SigningKey:
    return SigningKey.derive(SEED, run_uid, Role.OPERATOR)


def report_key(run_uid: str = UID) -> SigningKey:
    return SigningKey.derive(SEED, run_uid, Role.REPORT)


class FakeClock:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000_000

    def __call__(self) -> Moment:
        return Moment(self.ns, datetime.fromtimestamp(1_790_000_000 + self.ns / 1e9, UTC))

    def advance(self, seconds: float) -> Moment:
        self.ns += int(seconds * 1e9)
        return self()


def event(writer: str = "tolaria", monotonic_ns: int = 0, **content: Any) -> RuntimeEvent:
    """event(transition=Transition(...), counters=...) and so on."""
    made = RuntimeEvent(writer=writer, monotonic_ns=monotonic_ns or time.monotonic_ns(), **content)
    made.time.GetCurrentTime()
    return made


def boot(incarnation: int = 1) -> RuntimeEvent:
    return event("supervisor", boot=Boot(attempt=1, rank=0, incarnation=incarnation, world_size=1))


def transition(to_phase: RuntimePhase, from_phase: RuntimePhase = 0, step: int = 0, message: str = "") -> RuntimeEvent:
    return event(
        transition=Transition(from_phase=from_phase, to_phase=to_phase, reason="Training", step=step, message=message)
    )


def beat(step: int, *, ns: int, phase: RuntimePhase = RUNNING, loss: float = 0.5, epoch: int = 1) -> Heartbeat:
    return Heartbeat(step, epoch, phase, ns, loss, 1000, 4242, 0)


def signal_message(seq: int, **changes: Any) -> EmergencySignal:
    fields: dict[str, Any] = {
        "version": 1,
        "level": EmergencyLevel.EMERGENCY_LEVEL_HALT,
        "run_uid": UID,
        "signal_id": f"{seq:032x}",
        "mode": FREEZE,
        "term": 0,
        "seq": seq,
        "source": EmergencySource.EMERGENCY_SOURCE_SPEC,
    }
    return EmergencySignal(**{**fields, **changes})


def sealed(message: EmergencySignal, *, key: SigningKey | None = None, run_uid: str = UID) -> BusEnvelope:
    return signing.seal(
        message.SerializeToString(),
        BusMessageType.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL,
        run_uid=run_uid,
        key=key or operator_key(),
        priority=MessagePriority.MESSAGE_PRIORITY_CRITICAL,
    )


def signal_bytes(seq: int, **changes: Any) -> bytes:
    return sealed(signal_message(seq, **changes)).SerializeToString()


def opened(raw: bytes) -> RunReport:
    """The report in a sealed envelope, its signature checked."""
    envelope = BusEnvelope.FromString(raw)
    Verifier.from_text(report_key().public_text()).check_envelope(envelope)
    report = RunReport.FromString(envelope.payload)
    assert envelope.run_uid == report.run_uid == UID
    return report


class PodFiles:
    """The directories of one pod, and a weatherlight process in them when started."""

    def __init__(self, root: Path, *, redis_url: str = "") -> None:
        self.root = root
        for name in ("run", "keys", "bus", "emergency"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.run_dir = root / "run"
        (root / "keys" / signing.REPORT_PRIVATE).write_text(report_key().to_text())
        (root / "keys" / signing.OPERATOR_PUBLIC).write_text(operator_key().public_text())
        if redis_url:
            (root / "bus" / paths.BUS_URL).write_text(redis_url)
        self.process: subprocess.Popen[bytes] | None = None
        self._journal: JournalWriter | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            env.RUN: "digits",
            env.NAMESPACE: "team",
            env.RUN_UID: UID,
            env.ATTEMPT: "1",
            env.RANK: "0",
            env.POD_NAME: "digits-a1-0",
            env.NODE_NAME: "node-1",
            env.RUN_DIR: str(self.run_dir),
            env.KEYS_DIR: str(self.root / "keys"),
            env.BUS_DIR: str(self.root / "bus"),
            env.EMERGENCY_DIR: str(self.root / "emergency"),
            env.HTTP_PORT: "0",
            env.LOG_FORMAT: "json",
        }

    # --- the process ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "esper_runtime.weatherlight"],
                env={**os.environ, **self.environment},
                stderr=log,
                start_new_session=True,
            )

    def worker_pid(self) -> int | None:
        """PID of the newest worker under the sidecar's PID 1."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            found = children.read_text().split()
        except FileNotFoundError:
            return None
        return int(found[-1]) if found else None

    def kill_worker(self) -> None:
        pid = self.worker_pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def stop(self) -> int:
        """Like the kubelet: SIGTERM and wait. The exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(PATIENT_S)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def log(self) -> str:
        return (self.root / "log").read_text()

    # --- the trainer's side --------------------------------------------------------------------------------------

    @property
    def journal(self) -> JournalWriter:
        if self._journal is None:
            self._journal = JournalWriter(self.run_dir / paths.JOURNAL)
        return self._journal

    def emergency(self) -> EmergencyRecord | None:
        """What the trainer sees."""
        try:
            page = Page.open(self.run_dir / paths.EMERGENCY_PAGE)
        except PageError:
            return None
        try:
            return EmergencyRecord.of(page.read())
        finally:
            page.close()

    # --- the kubelet's and the laptop's side ---------------------------------------------------------------------

    def mount_signal(self, raw: bytes) -> None:
        """Replaces the mounted file in one rename, as the laptop runner does."""
        temporary = self.root / "emergency" / ".signal.tmp"
        temporary.write_bytes(base64.b64encode(raw))
        temporary.replace(self.root / "emergency" / paths.EMERGENCY_SIGNAL)

    # --- the operator's side -------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{(self.run_dir / 'weatherlight.port').read_text().strip()}"

    async def ready(self) -> bool:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}/readyz") as answer:
                return answer.status == 200
        except (OSError, aiohttp.ClientError):
            return False

    async def pull(self, after: int = 0, wait: int = 0) -> ReportBatch:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/v1/reports?after={after}&wait={wait}") as answer,
        ):
            assert answer.status == 200, await answer.text()
            return ReportBatch.FromString(await answer.read())

    async def reports(self, after: int = 0, wait: int = 0) -> list[RunReport]:
        return [opened(raw) for raw in (await self.pull(after, wait)).envelopes]

    async def metric(self, name: str) -> float:
        """Value of a sample such as esper_x_total{leg="redis"}."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as answer:
            for line in (await answer.text()).splitlines():
                if line.startswith(f"{name} "):
                    return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        if self.process is not None:
            self.stop()


def events_of(reports: list[RunReport]) -> Iterator[tuple[int, str]]:
    for report in reports:
        name = report.WhichOneof("event")
        if name is not None:
            yield report.seq, name
