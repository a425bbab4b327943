"""Processes that cannot be started, as at a limit of processes: `at_limit` is called in the supervisor under test."""

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STARTS = "refuse-starts"
SPARES = "refuse-spares"
"""Files in the run directory: how many starts of that kind fail from now on."""


def at_limit(run_dir: Path) -> None:
    """From now on os.posix_spawn fails as often as the files say, with EAGAIN."""
    real = os.posix_spawn

    def posix_spawn(path: str, argv: Sequence[str], env: Mapping[str, str], **more: Any) -> int:
        _, _, _, _, *descriptor = argv
        if _refused(run_dir / (SPARES if descriptor else STARTS)):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        return real(path, argv, env, **more)

    os.posix_spawn = posix_spawn  # type: ignore[assignment]


def _refused(file: Path) -> bool:
    try:
        left = int(file.read_text())
    except FileNotFoundError:
        return False
    if left:
        file.write_text(str(left - 1))
    return left > 0
