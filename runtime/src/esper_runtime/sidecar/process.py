"""Two requests to the Linux kernel about process trees, which the standard library does not offer."""

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans, as PID 1 of a container is anyway."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def terminate_with_parent(parent: int) -> bool:
    """Asks for SIGTERM when the parent dies. False when `parent` is gone already."""
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    return os.getppid() == parent


def _prctl(option: int, value: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "prctl")
