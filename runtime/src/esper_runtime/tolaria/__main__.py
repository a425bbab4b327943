"""`python -m esper_runtime.tolaria`: PID 1 of the tolaria container, or a container's process on a laptop."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from esper_leyline import env
from esper_leyline.exitcodes import ExitCode
from esper_leyline.paths import UMASK
from esper_leyline.reasons import RunReason

from esper_runtime.checkpoint import CheckpointDirError
from esper_runtime.sidecar import logs
from esper_runtime.sidecar.environment import SettingsError
from esper_runtime.sidecar.process import adopt_orphans
from esper_runtime.tolaria.lastword import LastWord
from esper_runtime.tolaria.supervisor.loop import Supervisor
from esper_runtime.tolaria.supervisor.settings import Settings

log = logging.getLogger(__name__)


def main(environ: Mapping[str, str], *, trainer_module: str | None = None) -> int:
    """Runs one container's life and returns its exit code. `trainer_module` is for tests."""
    os.umask(UMASK)
    logs.configure("tolaria", environ)
    adopt_orphans()
    try:
        settings = Settings.read(environ, trainer_module=trainer_module)
        return Supervisor(settings, environ).run()
    except SettingsError as error:
        return _refuse(environ, ExitCode.CONFIG, RunReason.CONFIG_ERROR, str(error))
    except CheckpointDirError as error:
        return _refuse(environ, ExitCode.CHECKPOINT_DIR, RunReason.CHECKPOINT_DIR_UNUSABLE, str(error))


def _refuse(environ: Mapping[str, str], code: ExitCode, reason: RunReason, message: str) -> int:
    """The end of a container that could not even begin."""
    log.error("%s", message)
    path = environ.get(env.TERMINATION_LOG)
    if path:
        try:
            LastWord(reason=reason, message=message, exit_code=code).write_in_place(Path(path))
        except OSError as error:
            log.error("cannot write %s: %s", path, error)
    return code


if __name__ == "__main__":
    sys.exit(main(os.environ))
