"""gRPC as the trainer uses it: silent, without forks, one channel per sidecar for as long as the same process listens.

The only module of the trainer that imports grpc, because grpc reads its environment when it is imported.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

# Its C core would tell standard error about each missing sidecar; we say so once, as a Degradation.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# No child of the trainer uses gRPC, and gRPC's handlers may block a fork that happens beside a late call.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
from esper_leyline.v1.command_pb2 import OpenBoundaryRequest
from esper_leyline.v1.command_pb2_grpc import (
    KasminaAuthorityServiceStub,
    TamiyoPolicyServiceStub,
)

# glibc gives every thread an arena of its own, and each of gRPC's would touch fresh pages for many boundaries to come.
_M_ARENA_MAX: Final = -8
with contextlib.suppress(AttributeError, OSError):  # another C library has no such option
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)

Channel = grpc.Channel
RpcError = grpc.RpcError

NOBODY: Final = (0, 0)
MAX_MESSAGE: Final = 256
"""Characters of an explanation."""

_CHANNEL_OPTIONS: Final = (
    # Else a new channel would inherit the connection, and the back-off, of the last one.
    ("grpc.use_local_subchannel_pool", 1),
    # A repeated SubmitCommand would be refused as a replay.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 256 * 1024),
)

# The generated stubs carry no types.
kasmina: Callable[[grpc.Channel], Any] = KasminaAuthorityServiceStub
tamiyo: Callable[[grpc.Channel], Any] = TamiyoPolicyServiceStub


def channel(socket: Path) -> grpc.Channel:
    """A channel to a Unix socket. Connects with the first call."""
    return grpc.insecure_channel(f"unix:{socket}", options=_CHANNEL_OPTIONS)


class Line:
    """The way to one sidecar: a channel that is kept until it is closed, or another process listens at the socket.

    For one thread, of which another one may close it in the middle of a call: that raises ValueError or RpcError.
    """

    def __init__(self, socket: Path, make_stub: Callable[[grpc.Channel], Any]) -> None:
        self._socket = socket
        self._make_stub = make_stub
        self._channel: grpc.Channel | None = None
        self._stub: Any = None
        self._listener = NOBODY

    def open(self) -> Any:
        """The sidecar's stub. A new channel has no back-off, so who is there again is reached at once."""
        listener = listener_at(self._socket)
        if self._channel is None or listener != self._listener:
            self.close()
            self._channel = channel(self._socket)
            self._stub, self._listener = self._make_stub(self._channel), listener
        return self._stub

    def close(self) -> None:
        """Ends a call under way."""
        kept, self._channel = self._channel, None
        if kept is not None:
            kept.close()


def listener_at(socket: Path) -> tuple[int, int]:
    """(inode, time of its last change) of a socket, another one for each process that listens; NOBODY without one."""
    try:
        found = socket.stat()
    except OSError:
        return NOBODY
    return found.st_ino, found.st_ctime_ns


def warm_up(socket: Path) -> None:
    """gRPC's first call in a process costs some 30 ms, twice the soft deadline; this one is made before training."""
    with channel(socket.with_suffix(".warm-up")) as nobody, contextlib.suppress(grpc.RpcError):
        kasmina(nobody).OpenBoundary(OpenBoundaryRequest(), timeout=1.0)


def timed_out(error: grpc.RpcError) -> bool:
    return isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def explained(component: str, error: grpc.RpcError) -> str:
    """Why `component` gave no answer, for people; at most MAX_MESSAGE characters."""
    if not isinstance(error, grpc.Call):
        return f"{component} does not answer: {error}"[:MAX_MESSAGE]
    if timed_out(error):
        return f"{component} gave no answer within the hard deadline"
    return f"{component} does not answer: {error.code().name}: {error.details()}"[:MAX_MESSAGE]
