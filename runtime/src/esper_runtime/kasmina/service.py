"""The gRPC face of the verifier, and its metrics."""

import time
from typing import Any

import grpc
from esper_leyline.reasons import CommandRejection
from esper_leyline.v1.command_pb2 import CommandVerdict, OpenBoundaryRequest, OpenBoundaryResponse, SignedCommand
from esper_leyline.v1.command_pb2_grpc import KasminaAuthorityServiceServicer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from esper_runtime.kasmina.verifier import CommandVerifier


class Metrics:
    """What Kasmina counts. Every rejection reason has a series from the start, so that rate() sees the first one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "esper_kasmina_command_verifier"
        self.accepted = Counter(f"{prefix}_accepted", "Commands that may act.", registry=registry)
        self.rejections = Counter(f"{prefix}_rejections", "Commands refused, by reason.", ["reason"], registry=registry)
        self.latency = Histogram(
            f"{prefix}_validation_seconds",
            "Time to verify one command.",
            buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1),
            registry=registry,
        )
        self.boundaries = Counter("esper_kasmina_boundaries_opened", "Epoch boundaries opened.", registry=registry)
        self.nonces = Gauge("esper_kasmina_nonce_ledger_size", "Nonces and ids remembered.", registry=registry)
        for reason in CommandRejection:
            self.rejections.labels(reason=reason.value)


class KasminaService(KasminaAuthorityServiceServicer):
    """Runs on one event loop, so the verifier has one caller at a time."""

    def __init__(self, verifier: CommandVerifier, metrics: Metrics) -> None:
        self._verifier = verifier
        self._metrics = metrics

    async def OpenBoundary(
        self, request: OpenBoundaryRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> OpenBoundaryResponse:
        if request.run_uid != self._verifier.run_uid:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"run_uid is {request.run_uid[:64]!r}; this verifier serves {self._verifier.run_uid!r}",
            )
        self._metrics.boundaries.inc()
        return OpenBoundaryResponse(packet_id=self._verifier.open_boundary())

    async def SubmitCommand(
        self, request: SignedCommand, context: grpc.aio.ServicerContext[Any, Any]
    ) -> CommandVerdict:
        started = time.perf_counter()
        verdict = self._verifier.submit(request)
        self._metrics.latency.observe(time.perf_counter() - started)
        self._metrics.nonces.set(self._verifier.remembered_nonces)
        if verdict.rejection is None:
            self._metrics.accepted.inc()
            return CommandVerdict(accepted=True, command_id=verdict.command_id)
        self._metrics.rejections.labels(reason=verdict.rejection.value).inc()
        return CommandVerdict(accepted=False, reason=verdict.rejection.value, command_id=verdict.command_id)
