"""Facts of the run that no rollback and no restart undoes: counters, fired faults, learning rate, skipped batches.

They live in the run's write-ahead log. When its volume fails they go on in memory, so that training can too, and the
log gets all of them at once when it can be written again.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from esper_leyline.v1.report_pb2 import Counters

from esper_runtime.checkpoint import Wal, WalState
from esper_runtime.checkpoint.wal import Kind

log = logging.getLogger(__name__)


class Facts:
    """Reads the log once, then keeps it and memory in step."""

    def __init__(self, wal: Wal, *, run_seconds: Callable[[], float]) -> None:
        self._wal = wal
        self._run_seconds = run_seconds
        self._state: WalState = wal.replay()
        self.lost = ""
        """Why facts are in memory alone; empty when all of them are durable."""

    @property
    def state(self) -> WalState:
        return self._state

    def counters(self) -> Counters:
        return self._state.counters()

    def record(self, kind: Kind, **fields: Any) -> bool:
        """Adds a fact. False when it could not be made durable; it counts in this process all the same."""
        self._state = self._state.after(kind, fields)
        if self.lost:  # the log lacks older facts too
            return self._append(Kind.STATE, self._state.fields())
        return self._append(kind, fields)

    def settle(self) -> None:
        """Writes what the log lacks. Call when its volume is known to work again."""
        if self.lost:
            self._append(Kind.STATE, self._state.fields())

    def _append(self, kind: Kind, fields: dict[str, Any]) -> bool:
        try:
            self._wal.append(kind, **fields)
        except OSError as error:
            self.lost = f"{self._wal.path}: {error.strerror}"
            log.error("a fact (%s) is not durable: %s", kind, self.lost)
            return False
        self.lost = ""
        return True

    def rolled_back(
        self, *, cause: str, from_step: int, to_step: int, skipped: Sequence[int] = (), scale: float | None = None
    ) -> None:
        """With all that it changes for good in one record, so that a kill leaves the whole of it or nothing.

        `time` of the record is the run's own clock: seconds of training, so that no wall clock decides.
        """
        self.record(
            Kind.ROLLBACK,
            cause=cause,
            from_step=from_step,
            to_step=to_step,
            time=self._run_seconds(),
            skipped=list(skipped),
            scale=scale,
        )

    def rollbacks_within(self, window_s: float) -> int:
        """Rollbacks in the last `window_s` seconds of training."""
        now = self._run_seconds()
        return sum(1 for time in self._state.rollback_times if now - time < window_s)
