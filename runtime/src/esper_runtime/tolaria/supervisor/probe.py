"""/livez and /metrics of the supervisor, in a thread of the standard library's small server."""

import logging
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import BoundedSemaphore, Thread
from typing import ClassVar

MAX_CONNECTIONS = 16
TIMEOUT_S = 5.0
log = logging.getLogger(__name__)


class ProbeServer(ThreadingHTTPServer):
    """Listens on all devices, or for port 0 on a free port of the loopback device, which goes to `port_file`."""

    daemon_threads = True

    def __init__(self, port: int, *, port_file: Path, alive: Callable[[], bool], metrics: Callable[[], str]) -> None:
        self.alive = alive
        self.metrics = metrics
        self._slots = BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(("127.0.0.1" if port == 0 else "", port), _Handler)
        if port == 0:
            draft = port_file.with_name(f".{port_file.name}")
            draft.write_text(f"{self.server_port}\n")
            draft.replace(port_file)

    def start(self) -> None:
        Thread(target=self.serve_forever, name="probe", daemon=True, kwargs={"poll_interval": 60.0}).start()

    def process_request(self, request: "socket.socket | tuple[bytes, socket.socket]", client_address: object) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)  # a probe comes again; a flood does not get more threads
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # at a limit of threads there is none for it
            self._slots.release()
            raise

    def process_request_thread(
        self, request: "socket.socket | tuple[bytes, socket.socket]", client_address: object
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("request from %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout: ClassVar[float] = TIMEOUT_S
    server: ProbeServer

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/livez" if self.server.alive():
                self._answer(HTTPStatus.OK, "ok\n")
            case "/livez":
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "the supervisor's loop stands still\n")
            case "/metrics":
                self._answer(HTTPStatus.OK, self.server.metrics(), "text/plain; version=0.0.4; charset=utf-8")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, "there are /livez and /metrics\n")

    def _answer(self, status: HTTPStatus, text: str, content_type: str = "text/plain; charset=utf-8") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Probes every few seconds are no news."""
