"""Writes a store's saves into the run's log: one transaction each, one at a time."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from esper_runtime.checkpoint.wal import Kind, Wal

RESERVE_BYTES = 64 * 1024
"""Room in the log for the end of a transaction that has begun: a full volume must not keep it open."""
MAX_ERROR = 512
log = logging.getLogger(__name__)


class Ledger:
    """Used by the one thread that saves; the log itself is safe beside others."""

    def __init__(self, wal: Wal, *, attempt: int) -> None:
        self._wal = wal
        self._attempt = attempt
        self._told = False
        self._uncommitted: dict[str, Any] | None = None
        """Fields of a COMMIT that the volume did not take."""

    def resolve(self, *, is_whole: Callable[[int, int, int], int | None]) -> None:
        """Ends what an earlier process left open. `is_whole(attempt, number, step)` gives its files, None if not."""
        left = self._wal.transactions.open
        if left is None:
            return
        files = is_whole(left.attempt, left.number, left.step)
        where = {"txn": left.txn, "attempt": left.attempt, "number": left.number, "step": left.step}
        if files is None:
            self._end(Kind.ABORT, {"txn": left.txn, "error": "interrupted"})
        else:
            self._end(Kind.COMMIT, {**where, "files": files, "recovered": True})
        log.info("save %d of step %d was interrupted; %s", left.txn, left.step, "lost" if files is None else "it holds")

    def begin(self, *, number: int, step: int, epoch: int, context: Mapping[str, str]) -> int:
        """The new transaction's number. OSError when the log takes no more."""
        self.finish()
        txn = self._wal.transactions.last + 1
        fields: dict[str, Any] = {"txn": txn, "attempt": self._attempt, "number": number, "step": step, "epoch": epoch}
        if not self._told:
            fields["context"] = dict(context)
        self._wal.reserve(RESERVE_BYTES)
        self._wal.append(Kind.BEGIN, **fields)
        self._told = True
        return txn

    def commit(self, txn: int, *, number: int, step: int, files: int) -> bool:
        """False when the log did not take it; it is tried again before the next save."""
        fields = {"txn": txn, "attempt": self._attempt, "number": number, "step": step, "files": files}
        if self._end(Kind.COMMIT, fields):
            return True
        self._uncommitted = fields
        return False

    def abort(self, txn: int, why: str) -> None:
        """The next begin() marks it as interrupted where the log does not take this."""
        self._end(Kind.ABORT, {"txn": txn, "error": why[:MAX_ERROR]})

    def finish(self) -> None:
        """Makes up for a COMMIT that failed. OSError when it fails again."""
        if self._uncommitted is not None:
            self._wal.append(Kind.COMMIT, **self._uncommitted)
            self._uncommitted = None

    def _end(self, kind: Kind, fields: dict[str, Any]) -> bool:
        try:
            self._wal.append(kind, **fields)
        except OSError as error:
            log.error("the log did not take %s of save %s: %s", kind, fields["txn"], error)
            return False
        return True
