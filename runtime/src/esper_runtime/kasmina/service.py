"""The gRPC face of the verifier, and its metrics."""

import time
from typing import Any

import grpc
from esper_leyline.metrics import kasmina as names
from esper_leyline.reasons import CommandRejection
from esper_leyline.v1.command_pb2 import CommandVerdict, OpenBoundaryRequest, OpenBoundaryResponse, SignedCommand
from esper_leyline.v1.command_pb2_grpc import KasminaAuthorityServiceServicer
from prometheus_client import CollectorRegistry

from esper_runtime.kasmina.verifier import CommandVerifier, Verdict
from esper_runtime.sidecar.metrics import Exporter


class Metrics:
    """What Kasmina counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = Exporter(registry)
        self.accepted = make.counter(names.ACCEPTED)
        self.rejections = make.counter(names.REJECTIONS)
        self.latency = make.histogram(names.VALIDATION)
        self.last_latency = make.gauge(names.VALIDATION_LATENCY)
        self.boundaries = make.counter(names.BOUNDARIES)
        self.nonces = make.gauge(names.NONCES)
        self.evictions = make.counter(names.NONCE_EVICTIONS)
        self.nonce_ttl = make.gauge(names.NONCE_TTL)


class KasminaService(KasminaAuthorityServiceServicer):
    """Runs on one event loop, so the verifier has one caller at a time."""

    def __init__(self, verifier: CommandVerifier, metrics: Metrics) -> None:
        self._verifier = verifier
        self._metrics = metrics
        self._forgotten = 0
        metrics.nonce_ttl.set(verifier.window_s)
        self._halted = False

    def halt(self, halted: bool) -> None:
        """While the run is halted no command is let through, whoever has signed it."""
        self._halted = halted

    async def OpenBoundary(
        self, request: OpenBoundaryRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> OpenBoundaryResponse:
        if request.run_uid != self._verifier.run_uid:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"run_uid is {request.run_uid[:64]!r}; this verifier serves {self._verifier.run_uid!r}",
            )
        self._metrics.boundaries.inc()
        self._count_ledger()
        return OpenBoundaryResponse(packet_id=self._verifier.open_boundary())

    async def SubmitCommand(
        self, request: SignedCommand, context: grpc.aio.ServicerContext[Any, Any]
    ) -> CommandVerdict:
        started = time.perf_counter()
        verdict = Verdict("", CommandRejection.HALTED) if self._halted else self._verifier.submit(request)
        self._count(time.perf_counter() - started)
        if verdict.rejection is None:
            self._metrics.accepted.inc()
            return CommandVerdict(accepted=True, command_id=verdict.command_id)
        self._metrics.rejections.labels(reason=verdict.rejection.value).inc()
        return CommandVerdict(accepted=False, reason=verdict.rejection.value, command_id=verdict.command_id)

    def _count(self, took_s: float) -> None:
        self._metrics.latency.observe(took_s)
        self._metrics.last_latency.set(took_s * 1e3)
        self._count_ledger()

    def _count_ledger(self) -> None:
        metrics, verifier = self._metrics, self._verifier
        metrics.nonces.set(verifier.remembered_nonces)
        metrics.evictions.inc(verifier.forgotten_nonces - self._forgotten)
        self._forgotten = verifier.forgotten_nonces
