"""A gRPC server on a Unix socket in the run's memory volume, as an async context manager."""

import contextlib
import logging
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import grpc

from esper_runtime.sidecar.environment import SettingsError

log = logging.getLogger(__name__)

SOCKET_MODE: Final = 0o660
MAX_SOCKET_PATH: Final = 107
"""Bytes of a Unix socket's path that Linux takes."""

_STOP_GRACE_S: Final = 1.0
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 256 * 1024),
    ("grpc.max_send_message_length", 256 * 1024),
    ("grpc.so_reuseport", 0),
)
_MAX_CONCURRENT_RPCS: Final = 16
"""One trainer asks one question at a time; more than this is refused with RESOURCE_EXHAUSTED."""


@contextlib.asynccontextmanager
async def serving(path: Path, register: Callable[[Any, Any], None], servicer: object) -> AsyncIterator[None]:
    """Serves while the context is open. `register` is the generated add_..._to_server function.

    A socket that a killed predecessor left behind is replaced. SettingsError when the path cannot be used.
    """
    _remove_stale(path)
    server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_MAX_CONCURRENT_RPCS)
    register(servicer, server)
    try:
        server.add_insecure_port(f"unix:{path}")
        path.chmod(SOCKET_MODE)
    except (RuntimeError, OSError) as error:
        raise SettingsError(f"cannot listen on {path}: {error}") from error
    await server.start()
    log.info("listening", extra={"socket": str(path)})
    try:
        yield
    finally:
        await server.stop(_STOP_GRACE_S)
        path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    if len(str(path).encode()) > MAX_SOCKET_PATH:
        raise SettingsError(f"socket path {path} is longer than {MAX_SOCKET_PATH} bytes; use a shorter run directory")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SettingsError(f"{path} is in the way and no socket; remove it")
    path.unlink()
