"""What must be so before weatherlight runs at all: settings, keys, and a memory volume that takes writes.

What no restart mends ends the container with an exit code of its own and one line in the log that says what would.
Redis is none of it: see `bus`.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from esper_leyline import signing

from esper_runtime.sidecar.environment import Environment, VolumeError
from esper_runtime.sidecar.http import write_atomically
from esper_runtime.sidecar.keyfile import Keyring
from esper_runtime.weatherlight.settings import Settings

PROBE_FILE: Final = ".preflight"
_PASSING: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR})
"""A volume that is full may have room again: the next worker will see."""


def preflight(environment: Environment) -> Settings:
    """The settings, once all of it is known to be so. SettingsError, KeyFileError or VolumeError when it never will be;
    OSError when it may be later."""
    settings = Settings.load(environment)
    Keyring(settings.keys_dir / signing.OPERATOR_PUBLIC)
    _takes_writes(settings.run_dir)
    with _needed(settings.state_dir):
        settings.state_dir.mkdir(mode=0o770, exist_ok=True)
    _takes_writes(settings.state_dir)
    return settings


def _takes_writes(directory: Path) -> None:
    probe = directory / PROBE_FILE
    with _needed(directory):
        write_atomically(probe, b"weatherlight was here\n")
        probe.unlink()


@contextlib.contextmanager
def _needed(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _PASSING:
            raise
        remedy = "it must be a memory volume (emptyDir) that the pod's fsGroup may write"
        raise VolumeError(f"{path} cannot be written: {error.strerror}; {remedy}") from error
