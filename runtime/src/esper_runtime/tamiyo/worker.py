"""The worker process of the tamiyo sidecar. Ready = key loaded and socket listening."""

import asyncio
import sys

from esper_leyline import env
from esper_leyline.labels import TAMIYO
from esper_leyline.paths import TAMIYO_SOCKET
from esper_leyline.signing import TAMIYO_PRIVATE
from esper_leyline.v1.command_pb2_grpc import add_TamiyoPolicyServiceServicer_to_server as register
from prometheus_client import CollectorRegistry

from esper_runtime.sidecar.emergency import EmergencyWatch
from esper_runtime.sidecar.environment import Environment
from esper_runtime.sidecar.http import ProbeServer
from esper_runtime.sidecar.keyfile import private_key
from esper_runtime.sidecar.rpc import serving
from esper_runtime.sidecar.worker import run_worker, until_stopped
from esper_runtime.tamiyo.service import Metrics, TamiyoService


async def serve(environment: Environment, stop: asyncio.Event) -> None:
    registry = CollectorRegistry()
    service = TamiyoService(
        run_uid=environment.text(env.RUN_UID),
        key=private_key(environment.path(env.KEYS_DIR) / TAMIYO_PRIVATE).current,
        metrics=Metrics(registry),
    )
    emergency = EmergencyWatch(TAMIYO, environment)
    emergency.look(service.halt)
    # The probes open last: whoever finds them ready can call.
    async with (
        serving(environment.path(env.RUN_DIR) / TAMIYO_SOCKET, register, service),
        ProbeServer(TAMIYO, environment, ready=lambda: "", registry=registry),
    ):
        await until_stopped(stop, emergency.run(service.halt))


if __name__ == "__main__":
    sys.exit(run_worker(TAMIYO, serve))
