"""What a training pod does as the operator sees it, without a pod: steps, reports, obedience to emergency signals.

The same trainer lives in an API server in memory (`operatorworld`) and on a real one (`simulatednode`); a Host is what
it needs of either.
"""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from esper_leyline import labels
from esper_leyline.incidents import incident_at
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1 import report_pb2
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType
from esper_leyline.v1.emergency_pb2 import AckStage, EmergencyAck, EmergencyMode, EmergencySignal
from esper_leyline.v1.report_pb2 import RunReport, RuntimePhase

Object = dict[str, Any]

LOOKS_PER_STEP = 2
RUNNING = RuntimePhase.RUNTIME_PHASE_RUNNING
ROLLING = RuntimePhase.RUNTIME_PHASE_ROLLING_BACK


@dataclass
class Training:
    """What survives on the volume: the run's steps and its counters."""

    total_steps: int = 20
    nan_at: int | None = None
    step: int = 0
    """Made so far, saved or not."""
    saved_step: int = 0
    rollbacks: int = 0
    rejected_signals: int = 0
    incarnations: dict[int, int] = field(default_factory=dict)
    fired: bool = False


class Host(Protocol):
    def now(self) -> datetime: ...

    def training_of(self, uid: str) -> Training: ...

    def send(self, pod: str, report: RunReport, envelope: BusEnvelope) -> None: ...

    def signal(self, pod: str) -> EmergencySignal | None: ...

    async def end_container(self, pod: str, code: int, message: str) -> None: ...


class Trainer:
    """One pod's life: a step a second, reports, and obedience to `<run>-emergency`."""

    def __init__(self, host: Host, pod: Object, *, key_seed: bytes, step_s: float = 1.0) -> None:
        marks = pod["metadata"]["labels"]
        self.host = host
        self.step_s = step_s
        self.nudged = asyncio.Event()
        """Set by who has a signal for it: it need not wait for the next look."""
        self.namespace = pod["metadata"]["namespace"]
        self.pod = pod["metadata"]["name"]
        self.run_name = marks[labels.RUN]
        self.uid = marks[labels.RUN_UID]
        self.attempt = int(marks[labels.ATTEMPT])
        self.key = SigningKey.derive(key_seed, self.uid, Role.REPORT)
        self.training = host.training_of(self.uid)
        self.incarnation = self.training.incarnations.get(self.attempt, 0) + 1
        self.training.incarnations[self.attempt] = self.incarnation
        self.seq = self.incarnation << 32
        self.event_seq = 0
        self.step = self.training.saved_step
        self.steps = 0
        self.phase = RuntimePhase.RUNTIME_PHASE_STARTING
        self.frozen = False
        self.last_signal = (0, 0)

    async def run(self) -> None:
        await asyncio.sleep(self.step_s)
        self.move(RUNNING, "Training")
        while self.step < self.training.total_steps:
            code = await self.pause()
            if code is not None:
                await self.host.end_container(self.pod, code, self.last_word(code))
                return
            if not self.frozen:
                self.step += 1
                self.steps += 1
                self.training.step = self.step
                self.one_step()
            self.report()
        completion = report_pb2.Completion(export_path=f"{self.uid}/export", best_step=self.step)
        self.phase = RuntimePhase.RUNTIME_PHASE_SUCCEEDED
        self.report(completion=completion)
        await self.host.end_container(self.pod, 0, "")

    async def pause(self) -> int | None:
        """A step's time, in which signals are looked for; the exit code when one ends the trainer."""
        for _ in range(LOOKS_PER_STEP):
            with suppress(TimeoutError):
                async with asyncio.timeout(self.step_s / LOOKS_PER_STEP):
                    await self.nudged.wait()
            self.nudged.clear()
            code = self.obey()
            if code is not None:
                return code
        return None

    def one_step(self) -> None:
        training = self.training
        if training.nan_at == self.step and not training.fired:
            training.fired = True
            self.move(ROLLING, "NonFiniteLoss")
            training.rollbacks += 1
            recovery = report_pb2.Recovery(
                kind=report_pb2.RECOVERY_KIND_IN_PROCESS, cause="NonFiniteLoss", from_step=self.step,
                to_step=self.step - 1, detect_ms=1.0, recover_ms=20.0, verified=True,
            )  # fmt: skip
            self.step -= 1
            self.report(recovery=recovery, incident=incident_at(self.uid, self.attempt, 0, 1, 1, training.rollbacks))
            self.move(RUNNING, "RolledBack")
        elif self.step % 5 == 0:
            training.saved_step = self.step
            self.report(saved=report_pb2.CheckpointState(latest_step=self.step, latest_verified_step=self.step))

    def obey(self) -> int | None:
        """Follows a new signal; the exit code when it ends the trainer."""
        signal = self.signal()
        if signal is None or (signal.term, signal.seq) <= self.last_signal or signal.attempt != self.attempt:
            return None
        self.last_signal = (signal.term, signal.seq)
        for sidecar in ("kasmina", "tamiyo"):
            self.acknowledge(signal, AckStage.ACK_STAGE_DONE, participant=sidecar)
        if signal.clear:
            self.frozen = False
            self.move(RUNNING, "Resumed")
            self.acknowledge(signal, AckStage.ACK_STAGE_DONE)
            return None
        self.acknowledge(signal, AckStage.ACK_STAGE_SEEN)
        if signal.mode == EmergencyMode.EMERGENCY_MODE_FREEZE:
            self.frozen = True
            self.move(RuntimePhase.RUNTIME_PHASE_FROZEN, "Frozen")
            self.acknowledge(signal, AckStage.ACK_STAGE_DONE)
            return None
        self.move(RuntimePhase.RUNTIME_PHASE_HALTING, "EmergencyStop")
        if signal.mode == EmergencyMode.EMERGENCY_MODE_CHECKPOINT:
            self.training.saved_step = self.step
        self.acknowledge(signal, AckStage.ACK_STAGE_DONE)
        self.move(RuntimePhase.RUNTIME_PHASE_HALTED, "Halted")
        return 75

    def drain(self) -> None:
        """SIGTERM: saves."""
        self.training.saved_step = self.step
        self.move(RuntimePhase.RUNTIME_PHASE_STOPPING, "Drained")

    def rejected(self, reason: str, leg: str) -> None:
        """Weatherlight has ignored a signal."""
        self.training.rejected_signals += 1
        message = f"an emergency signal that came by {leg} was ignored: {reason}"
        self.report(notice=report_pb2.Notice(reason="SignalRejected", message=message, warning=True))

    def signal(self) -> EmergencySignal | None:
        """The newest that weatherlight would have, by whichever leg."""
        return self.host.signal(self.pod)

    def last_word(self, code: int) -> str:
        return json.dumps({"reason": "Halted", "message": "", "exitCode": code, "savedStep": self.training.saved_step})

    def acknowledge(self, signal: EmergencySignal, stage: AckStage, *, participant: str = "tolaria") -> None:
        ack = EmergencyAck(
            version=1, signal_id=signal.signal_id, run_uid=self.uid, attempt=self.attempt, rank=0,
            participant=participant, stage=stage, step=self.step, clear=signal.clear,
        )  # fmt: skip
        done = participant == "tolaria" and stage == AckStage.ACK_STAGE_DONE
        if done and signal.mode == EmergencyMode.EMERGENCY_MODE_CHECKPOINT:
            ack.saved_step = self.training.saved_step
        self.report(ack=ack)

    def move(self, to: RuntimePhase, reason: str) -> None:
        transition = report_pb2.Transition(from_phase=self.phase, to_phase=to, reason=reason, step=self.step)
        transition.time.FromDatetime(self.host.now())
        self.phase = to
        self.report(transition=transition)

    def report(self, **event: Any) -> None:
        self.seq += 1
        report = RunReport(
            version=1, run_uid=self.uid, run=f"{self.namespace}/{self.run_name}", attempt=self.attempt, rank=0,
            seq=self.seq, pod_name=self.pod, node_name="node-1", phase=self.phase,
            previous_event_seq=self.event_seq, **event,
        )  # fmt: skip
        report.time.FromDatetime(self.host.now())
        report.progress.MergeFrom(
            report_pb2.Progress(step=self.step, total_steps=self.training.total_steps, loss=1.0 / (1 + self.step))
        )
        report.counters.rollbacks = self.training.rollbacks
        report.counters.rejected_signals = self.training.rejected_signals
        report.checkpoint.latest_step = self.training.saved_step
        report.checkpoint.latest_verified_step = self.training.saved_step
        if event:
            self.event_seq = self.seq
        kind = BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT
        self.host.send(self.pod, report, seal(report.SerializeToString(), kind, run_uid=self.uid, key=self.key))
