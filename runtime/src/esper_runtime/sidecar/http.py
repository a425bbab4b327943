"""Probes and metrics of a sidecar: /livez, /readyz, /metrics, and routes of its own, on ESPER_HTTP_PORT."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from aiohttp import web
from esper_leyline import env
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

from esper_runtime.sidecar.environment import Environment, SettingsError

log = logging.getLogger(__name__)

Check = Callable[[], str]
"""Empty when all is well, else one sentence that says what is missing."""

_MAX_REQUEST_BYTES: Final = 16 * 1024
_SHUTDOWN_S: Final = 1.0


def _fine() -> str:
    return ""


class ProbeServer:
    """An aiohttp server as an async context manager; listens while the context is open.

    Port 0 takes any free port on the loopback device (the one of the last start when it is still free) and writes
    it to `<run dir>/<name>.port`; any other port listens on all devices, as the kubelet's probes need.
    """

    def __init__(
        self,
        name: str,
        environment: Environment,
        *,
        ready: Check,
        alive: Check = _fine,
        registry: CollectorRegistry | None = None,
        routes: Iterable[web.RouteDef] = (),
    ) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        """Metrics of this process; process_* (CPU, memory, descriptors) are in it already."""
        ProcessCollector(registry=self.registry)
        self.port = environment.integer(env.HTTP_PORT)
        """The port in use, once the context is open."""
        self._port_file = None if self.port else environment.path(env.RUN_DIR) / f"{name}.port"
        app = web.Application(client_max_size=_MAX_REQUEST_BYTES)
        app.add_routes(
            [
                web.get("/livez", _probe(alive)),
                web.get("/readyz", _probe(ready)),
                web.get("/metrics", self._metrics),
                *routes,
            ]
        )
        # Cancelled with its client: a poll that was given up must not hold its place until its wait is over.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_S, handler_cancellation=True)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        try:
            if self._port_file is None:
                await self._listen(None, self.port)
            else:
                await self._listen_anywhere(self._port_file)
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsError(f"cannot listen on {env.HTTP_PORT}={self.port}: {error}") from error
        log.info("probes and metrics are up", extra={"port": self.port})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _listen(self, host: str | None, port: int) -> None:
        # SO_REUSEADDR only: a second sidecar on the same port must fail and not take half of the requests.
        await web.TCPSite(self._runner, host, port, reuse_address=True).start()
        self.port = int(self._runner.addresses[0][1])

    async def _listen_anywhere(self, port_file: Path) -> None:
        with contextlib.suppress(OSError, ValueError, OverflowError):
            await self._listen("127.0.0.1", int(port_file.read_text()))
            return
        await self._listen("127.0.0.1", 0)
        write_atomically(port_file, f"{self.port}\n".encode())

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self.registry), headers={"Content-Type": content_type})


def _probe(check: Check) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        problem = check()
        return web.Response(status=503 if problem else 200, text=(problem or "ok") + "\n")

    return answer


def write_atomically(path: Path, content: bytes, *, mode: int = 0o660) -> None:
    """Replaces `path` in one rename: a reader sees the old content or the new one. Not synced to a disk."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
