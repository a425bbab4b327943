"""The worker process of the kasmina sidecar. Ready = keys loaded and socket listening."""

import asyncio
import sys
import time
from pathlib import Path

from esper_leyline import env
from esper_leyline.paths import KASMINA_SOCKET
from esper_leyline.signing import TAMIYO_PUBLIC, Verifier
from esper_leyline.v1.command_pb2_grpc import add_KasminaAuthorityServiceServicer_to_server as register
from prometheus_client import CollectorRegistry

from esper_runtime.kasmina.service import KasminaService, Metrics
from esper_runtime.kasmina.verifier import CommandVerifier
from esper_runtime.sidecar.environment import Environment, SettingsError
from esper_runtime.sidecar.http import ProbeServer
from esper_runtime.sidecar.rpc import serving
from esper_runtime.sidecar.worker import run_worker


async def serve(environment: Environment, stop: asyncio.Event) -> None:
    verifier = CommandVerifier(
        run_uid=environment.text(env.RUN_UID),
        keys=read_keys(environment.path(env.KEYS_DIR) / TAMIYO_PUBLIC),
        clock_ns=time.monotonic_ns,
    )
    registry = CollectorRegistry()
    service = KasminaService(verifier, Metrics(registry))
    # The probes open last: whoever finds them ready can call.
    async with (
        serving(environment.path(env.RUN_DIR) / KASMINA_SOCKET, register, service),
        ProbeServer("kasmina", environment, ready=lambda: "", registry=registry),
    ):
        await stop.wait()


def read_keys(path: Path) -> Verifier:
    """Tamiyo's public keys, one hex line each."""
    try:
        return Verifier.from_text(path.read_text())
    except FileNotFoundError as error:
        raise SettingsError(f"{path} is missing; the operator mounts it from the Secret <run>-keys") from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} holds no public keys, one of 64 hex digits a line: {error}") from error


if __name__ == "__main__":
    sys.exit(run_worker("kasmina", serve))
