"""The worker process of the tamiyo sidecar. Ready = key loaded and socket listening."""

import asyncio
import sys
from pathlib import Path

from esper_leyline import env
from esper_leyline.paths import TAMIYO_SOCKET
from esper_leyline.signing import TAMIYO_PRIVATE, SigningKey
from esper_leyline.v1.command_pb2_grpc import add_TamiyoPolicyServiceServicer_to_server as register
from prometheus_client import CollectorRegistry

from esper_runtime.sidecar.environment import Environment, SettingsError
from esper_runtime.sidecar.http import ProbeServer
from esper_runtime.sidecar.rpc import serving
from esper_runtime.sidecar.worker import run_worker
from esper_runtime.tamiyo.service import Metrics, TamiyoService


async def serve(environment: Environment, stop: asyncio.Event) -> None:
    registry = CollectorRegistry()
    service = TamiyoService(
        run_uid=environment.text(env.RUN_UID),
        key=read_key(environment.path(env.KEYS_DIR) / TAMIYO_PRIVATE),
        metrics=Metrics(registry),
    )
    # The probes open last: whoever finds them ready can call.
    async with (
        serving(environment.path(env.RUN_DIR) / TAMIYO_SOCKET, register, service),
        ProbeServer("tamiyo", environment, ready=lambda: "", registry=registry),
    ):
        await stop.wait()


def read_key(path: Path) -> SigningKey:
    """Tamiyo's private key. The message of an error never holds a part of it."""
    try:
        return SigningKey.from_text(path.read_text())
    except FileNotFoundError as error:
        raise SettingsError(f"{path} is missing; the operator mounts it from the Secret <run>-keys") from error
    except (OSError, ValueError):
        raise SettingsError(f"{path} holds no private key of 64 hex digits") from None


if __name__ == "__main__":
    sys.exit(run_worker("tamiyo", serve))
