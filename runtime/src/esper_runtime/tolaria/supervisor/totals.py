"""The run's totals, and the restarts that the supervisor adds to them. The trainer owns the log while it lives."""

import logging
from pathlib import Path

from esper_leyline.reasons import RunReason
from esper_leyline.v1 import report_pb2 as pb

from esper_runtime.checkpoint import CheckpointError, Wal
from esper_runtime.checkpoint.wal import Kind, WalState

log = logging.getLogger(__name__)


class Totals:
    """Of the log as it was when no trainer lived last. A volume that fails is logged and stops nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: WalState | None = None

    def replay(self) -> None:
        """Takes in what a trainer has added."""
        wal = Wal(self._path)
        try:
            self._state = wal.replay()
        except (OSError, CheckpointError) as error:
            log.error("cannot read %s: %s", self._path, error)
        finally:
            wal.close()

    def add_restart(self, cause: RunReason, step: int) -> None:
        wal = Wal(self._path)
        try:
            self._state = wal.append(Kind.RESTART, cause=cause, step=step)
        except (OSError, CheckpointError) as error:
            log.error("cannot record a restart in %s: %s", self._path, error)
            if self._state is not None:  # counted for this container's life at least
                self._state = self._state.after(Kind.RESTART, {})
        finally:
            wal.close()

    def counters(self) -> pb.Counters | None:
        """None while they are unknown."""
        return None if self._state is None else self._state.counters()
