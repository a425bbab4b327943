"""The connection to weatherlight. It stays open for the container's whole life, so that its end is news by itself."""

import contextlib
import errno
import logging
import selectors
import socket
from pathlib import Path

RETRY_S = 0.25
_NOT_THERE = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN})
log = logging.getLogger(__name__)


class WeatherlightLink:
    """Never blocks. Registers its socket with the loop's selector under itself as data."""

    def __init__(self, path: Path, selector: selectors.BaseSelector, *, greeting: bytes) -> None:
        self._path = path
        self._selector = selector
        self._greeting = greeting
        self._socket: socket.socket | None = None
        self._retry_at_s = 0.0
        self._missed = False
        self.connections = 0

    @property
    def connected(self) -> bool:
        return self._socket is not None

    def deadline_s(self) -> float | None:
        """When to call connect() again; None while connected."""
        return None if self.connected else self._retry_at_s

    def connect(self, *, now_s: float) -> bool:
        """Tries to connect when that is due. True when it just succeeded: the emergency page may have changed."""
        if self._socket is not None or now_s < self._retry_at_s:
            return False
        self._retry_at_s = now_s + RETRY_S
        attempt = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            attempt.connect(str(self._path))
            attempt.send(self._greeting)
        except OSError as error:
            attempt.close()
            if error.errno not in _NOT_THERE and not self._missed:
                log.warning("cannot reach weatherlight at %s: %s", self._path, error)
                self._missed = True
            return False
        self._missed = False
        self._socket = attempt
        self._selector.register(attempt, selectors.EVENT_READ, self)
        self.connections += 1
        return True

    def readable(self) -> bool:
        """Takes what arrived. True when weatherlight says that the emergency page changed."""
        assert self._socket is not None
        try:
            received = self._socket.recv(4096)
        except BlockingIOError:
            return False
        except OSError as error:
            log.info("connection to weatherlight broke: %s", error)
            received = b""
        if not received:
            self._drop()
        return b"e" in received

    def say_clean_end(self) -> None:
        """The container's end that follows is meant."""
        if self._socket is None:
            return
        with contextlib.suppress(OSError):  # it cannot be told; then it will say that the container died
            self._socket.send(b"x")
        self._drop()

    def _drop(self) -> None:
        assert self._socket is not None
        self._selector.unregister(self._socket)
        self._socket.close()
        self._socket = None
