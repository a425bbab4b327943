"""The gRPC face of the policy: checks the packet, decides, signs. Runs on one event loop, one decision at a time."""

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

import grpc
from esper_leyline.signing import SigningKey, sign_command
from esper_leyline.v1.command_pb2 import CommandType, RiskReason, SignedCommand
from esper_leyline.v1.command_pb2_grpc import TamiyoPolicyServiceServicer
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from esper_runtime.tamiyo.command import VERSION, command_of, facts_of
from esper_runtime.tamiyo.policy import Action, Decision, Memory, PolicyConfig, advance

MAX_PACKET_ID: Final = 64

log = logging.getLogger(__name__)


class Metrics:
    """What Tamiyo counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.decisions = Counter(
            "esper_tamiyo_decisions", "Decisions, by command type.", ["command_type"], registry=registry
        )
        self.refused = Counter("esper_tamiyo_refused_packets", "State packets not answered.", registry=registry)
        self.conservative = Gauge("esper_tamiyo_conservative_mode", "1 in conservative mode.", registry=registry)
        self.validation = Gauge("esper_tamiyo_best_validation", "Best value judged by so far.", registry=registry)
        self.latency = Histogram(
            "esper_tamiyo_inference_seconds",
            "Time to decide and sign.",
            buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.012, 0.1),
            registry=registry,
        )


class TamiyoService(TamiyoPolicyServiceServicer):
    """Answers for one run."""

    def __init__(
        self,
        *,
        run_uid: str,
        key: SigningKey,
        metrics: Metrics,
        config: PolicyConfig | None = None,
        new_command_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self._run_uid = run_uid
        self._key = key
        self._metrics = metrics
        self._config = config or PolicyConfig()
        self._new_command_id = new_command_id
        self._memory = Memory()

    async def Evaluate(self, request: SystemStatePacket, context: grpc.aio.ServicerContext[Any, Any]) -> SignedCommand:
        refusal = self._refusal(request)
        if refusal is not None:
            self._metrics.refused.inc()
            await context.abort(*refusal)
        started = time.perf_counter()
        before = self._memory
        self._memory, decision = advance(before, facts_of(request), self._config)
        command = command_of(decision, request, command_id=self._new_command_id())
        signed = sign_command(command, run_uid=self._run_uid, key=self._key)
        self._metrics.latency.observe(time.perf_counter() - started)
        self._record(before, decision, command.command_type)
        return signed

    def _refusal(self, packet: SystemStatePacket) -> tuple[grpc.StatusCode, str] | None:
        if packet.version != VERSION:
            return (
                grpc.StatusCode.INVALID_ARGUMENT,
                f"version is {packet.version}; this Tamiyo reads {VERSION}: use images of the same release",
            )
        if packet.training_run_id != self._run_uid:
            return (
                grpc.StatusCode.FAILED_PRECONDITION,
                f"training_run_id is {packet.training_run_id[:64]!r}; this Tamiyo serves {self._run_uid!r}",
            )
        if not 0 < len(packet.packet_id) <= MAX_PACKET_ID:
            return (
                grpc.StatusCode.INVALID_ARGUMENT,
                f"packet_id has {len(packet.packet_id)} characters; send the one that Kasmina's OpenBoundary gave",
            )
        return None

    def _record(self, before: Memory, decision: Decision, command_type: CommandType) -> None:
        self._metrics.decisions.labels(command_type=CommandType.Name(command_type)).inc()
        self._metrics.conservative.set(decision.conservative)
        if self._memory.best is not None:
            self._metrics.validation.set(self._memory.best)
        if decision.conservative != before.conservative:
            change = "entered" if decision.conservative else "left"
            risk = RiskReason.Name(self._memory.risk if decision.conservative else before.risk)
            log.warning("conservative mode %s: %s", change, decision.rationale, extra={"risk": risk})
        if decision.action is not Action.NO_OPERATION:
            log.warning("decided %s: %s", decision.action, decision.rationale, extra={"step": self._memory.step})
