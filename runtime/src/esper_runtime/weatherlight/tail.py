"""Follows the pod's journal: every event goes to the recorder with the offset behind it."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final

from esper_leyline import paths
from esper_leyline.journal import JournalReader
from esper_leyline.reasons import RunReason

from esper_runtime.inotify import Change, hints
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.recorder import Recorder

_BATCH: Final = 16
"""Events between two chances for others: signing takes its time, and a signal must not wait for a long journal."""
_EVERY_S: Final = 1.0
_POLL_S: Final = 0.05
_RELEASE_BYTES: Final = 256 * 1024
_DAMAGE_SHOWN_S: Final = 60.0

log = logging.getLogger(__name__)


class JournalTail:
    def __init__(
        self, run_dir: Path, recorder: Recorder, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_dir = run_dir
        self._recorder = recorder
        self._metrics = metrics
        self._clock = clock
        self._reader = JournalReader(run_dir / paths.JOURNAL, recorder.journal_offset)
        self._released = 0
        self._releasable = True
        self._skipped = 0
        self._damaged_at: float | None = None
        self._lock = asyncio.Lock()
        self._beat: Callable[[], None] = lambda: None

    async def run(self, beat: Callable[[], None] = lambda: None) -> None:
        """Endless. May be called again: an event that could not be taken in is read once more."""
        self._beat = beat
        self._rewind()
        mask = Change.MODIFY | Change.CREATE | Change.MOVED_TO
        async with aclosing(hints(self._run_dir, mask, every_s=_EVERY_S, poll_s=_POLL_S)) as changes:
            async for trouble in changes:
                beat()
                if trouble is not None:
                    log.debug("%s is polled: %s", self._run_dir, trouble)
                await self.drain()

    def _rewind(self) -> None:
        """To behind the last event that is in a kept report."""
        if self._reader.offset > self._recorder.journal_offset:
            self._reader.close()
            self._reader = JournalReader(self._reader.path, self._recorder.journal_offset)
            self._skipped = 0

    async def drain(self) -> None:
        """Brings in everything that is in the journal now."""
        async with self._lock:
            try:
                more = True
                while more:
                    more = self._take(_BATCH)
                    self._beat()
                    await asyncio.sleep(0)
            except OSError as error:
                self._damaged(f"the journal cannot be read: {error.strerror}")
            self._account()

    def _take(self, limit: int) -> bool:
        """At most `limit` events; True when there may be more."""
        for taken, event in enumerate(self._reader.events(), start=1):
            self._recorder.event(event, self._reader.offset)
            if taken == limit:
                return True
        return False

    def _account(self) -> None:
        if skipped := self._reader.skipped_bytes - self._skipped:
            self._skipped += skipped
            self._metrics.journal_skipped.inc(skipped)
            self._damaged(f"{skipped} bytes of the journal were no events and were skipped")
        elif self._damaged_at is not None and self._clock() - self._damaged_at > _DAMAGE_SHOWN_S:
            self._damaged_at = None
            self._recorder.restored("journal")
        # Only what is in kept reports may go: a worker killed now reads the rest again.
        kept = self._recorder.journal_offset
        if self._releasable and self._reader.offset == kept and kept - self._released > _RELEASE_BYTES:
            self._release()

    def _release(self) -> None:
        try:
            self._reader.release()
            self._released = self._recorder.journal_offset
        except OSError as error:
            self._releasable = False
            log.warning("the journal's memory cannot be given back: %s", error.strerror)

    def _damaged(self, message: str) -> None:
        self._damaged_at = self._clock()
        self._recorder.degraded("journal", RunReason.JOURNAL_DAMAGED, message)

    def close(self) -> None:
        self._reader.close()
