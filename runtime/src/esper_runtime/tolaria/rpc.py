"""gRPC as the trainer uses it: silent, without forks, one short-lived channel per sidecar and boundary.

The only module of the trainer that imports grpc, because grpc reads its environment when it is imported.
"""

import contextlib
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

Channel = grpc.Channel
RpcError = grpc.RpcError

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
