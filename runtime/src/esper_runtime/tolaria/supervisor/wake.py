"""Turns signals into something a selector can wait for."""

import selectors
import signal
import socket
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_STOPS = frozenset({signal.SIGTERM, signal.SIGINT})


class SignalWake:
    """Registers a socket with the selector that a signal makes readable, itself as data."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.stop_asked = False
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._selector = selector
        selector.register(self._reader, selectors.EVENT_READ, self)
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        self._previous_wake = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.stop_asked = self.stop_asked or number in _STOPS

    def take(self) -> None:
        """Empties the pipe; what was said is in stop_asked and in waitpid."""
        try:
            while self._reader.recv(4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous_wake)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._selector.unregister(self._reader)
        self._reader.close()
        self._writer.close()
