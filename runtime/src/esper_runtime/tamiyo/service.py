"""The gRPC face of the policy: checks the packet, decides, signs. Runs on one event loop, one decision at a time."""

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import grpc
from esper_leyline import contracts
from esper_leyline.metrics import tamiyo as names
from esper_leyline.signing import SigningKey, sign_command
from esper_leyline.v1.command_pb2 import CommandType, RiskReason, SignedCommand
from esper_leyline.v1.command_pb2_grpc import TamiyoPolicyServiceServicer
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from prometheus_client import CollectorRegistry

from esper_runtime.sidecar.metrics import Exporter
from esper_runtime.tamiyo.command import command_of, facts_of
from esper_runtime.tamiyo.policy import Action, Decision, Memory, PolicyConfig, advance

log = logging.getLogger(__name__)


class Metrics:
    """What Tamiyo counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = Exporter(registry)
        self.decisions = make.counter(names.DECISIONS)
        self.refused = make.counter(names.REFUSED)
        self.conservative = make.gauge(names.CONSERVATIVE)
        self.validation = make.gauge(names.BEST)
        self.latency = make.histogram(names.INFERENCE)


class TamiyoService(TamiyoPolicyServiceServicer):
    """Answers for one run."""

    def __init__(
        self,
        *,
        run_uid: str,
        key: Callable[[], SigningKey],
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
        self._halted = False

    def halt(self, halted: bool) -> None:
        """While the run is halted nothing is decided."""
        self._halted = halted

    async def Evaluate(self, request: SystemStatePacket, context: grpc.aio.ServicerContext[Any, Any]) -> SignedCommand:
        refusal = self._refusal(request)
        if refusal is not None:
            self._metrics.refused.inc()
            await context.abort(*refusal)
        started = time.perf_counter()
        before = self._memory
        if self._halted:
            decision = Decision(
                action=Action.NO_OPERATION,
                risk=before.risk,
                conservative=before.conservative,
                rationale="the run is halted",
            )
        else:
            self._memory, decision = advance(before, facts_of(request), self._config)
        command = command_of(decision, request, command_id=self._new_command_id())
        signed = sign_command(command, run_uid=self._run_uid, key=self._key())
        self._metrics.latency.observe(time.perf_counter() - started)
        self._record(before, decision, command.command_type)
        return signed

    def _refusal(self, packet: SystemStatePacket) -> tuple[grpc.StatusCode, str] | None:
        try:
            contracts.check(packet)
        except contracts.ContractError as error:
            remedy = ": use images of the same release" if error.wrong_version else ""
            return grpc.StatusCode.INVALID_ARGUMENT, f"{error}{remedy}"
        if packet.training_run_id != self._run_uid:
            return (
                grpc.StatusCode.FAILED_PRECONDITION,
                f"training_run_id is {packet.training_run_id[:64]!r}; this Tamiyo serves {self._run_uid!r}",
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
