"""The worker process of the kasmina sidecar. Ready = keys loaded and socket listening."""

import asyncio
import sys
import time

from esper_leyline import env
from esper_leyline.labels import KASMINA
from esper_leyline.paths import KASMINA_SOCKET
from esper_leyline.signing import TAMIYO_PUBLIC
from esper_leyline.v1.command_pb2_grpc import add_KasminaAuthorityServiceServicer_to_server as register
from prometheus_client import CollectorRegistry

from esper_runtime.kasmina.service import KasminaService, Metrics
from esper_runtime.kasmina.verifier import CommandVerifier
from esper_runtime.sidecar.emergency import EmergencyWatch
from esper_runtime.sidecar.environment import Environment
from esper_runtime.sidecar.http import ProbeServer
from esper_runtime.sidecar.keyfile import Keyring
from esper_runtime.sidecar.rpc import serving
from esper_runtime.sidecar.worker import run_worker, until_stopped


async def serve(environment: Environment, stop: asyncio.Event) -> None:
    verifier = CommandVerifier(
        run_uid=environment.text(env.RUN_UID),
        keys=Keyring(environment.path(env.KEYS_DIR) / TAMIYO_PUBLIC),
        clock_ns=time.monotonic_ns,
    )
    registry = CollectorRegistry()
    service = KasminaService(verifier, Metrics(registry))
    emergency = EmergencyWatch(KASMINA, environment)
    emergency.look(service.halt)
    # The probes open last: whoever finds them ready can call.
    async with (
        serving(environment.path(env.RUN_DIR) / KASMINA_SOCKET, register, service),
        ProbeServer(KASMINA, environment, ready=lambda: "", registry=registry),
    ):
        await until_stopped(stop, emergency.run(service.halt))


if __name__ == "__main__":
    sys.exit(run_worker(KASMINA, serve))
