"""Emergency signals as a sidecar takes part in them: it stops what it does for the trainer, and answers.

The page is weatherlight's. Writing it wakes the watcher here by inotify; where that does not work it is looked at
every POLL_S. Answers go into the pod's journal, as the trainer's do.
"""

import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

from esper_leyline import env, paths
from esper_leyline.incidents import FIELD
from esper_leyline.journal import JournalWriter
from esper_leyline.pages import EmergencyPage, EmergencyRecord, PageError
from esper_leyline.v1.emergency_pb2 import ACK_STAGE_DONE, EmergencyAck
from esper_leyline.v1.report_pb2 import RuntimeEvent

from esper_runtime.inotify import Change, hints
from esper_runtime.sidecar.environment import Environment

EVERY_S: Final = 1.0
"""The page is looked at this often even when nothing seems to have changed."""
POLL_S: Final = 0.02

log = logging.getLogger(__name__)


class EmergencyWatch:
    """Of one sidecar: whether the run is halted, and the answer to each signal, once per process."""

    def __init__(self, participant: str, environment: Environment) -> None:
        self._participant = participant
        self._run_dir = environment.path(env.RUN_DIR)
        self._run_uid = environment.text(env.RUN_UID)
        self._attempt = environment.integer(env.ATTEMPT, at_least=1)
        self._rank = environment.integer(env.RANK, 0)
        self._journal = JournalWriter(self._run_dir / paths.JOURNAL)
        self._page: EmergencyPage | None = None
        self._order = 0
        self._halted_by = ""
        """Id of the signal that is in force."""

    @property
    def halted(self) -> bool:
        """True from a signal of this attempt until that very signal is lifted."""
        return bool(self._halted_by)

    async def run(self, changed: Callable[[bool], None] = lambda halted: None) -> None:
        """Endless. `changed` is told at once."""
        mask = Change.ATTRIB | Change.CREATE | Change.MOVED_TO
        async with aclosing(hints(self._run_dir, mask, every_s=EVERY_S, poll_s=POLL_S)) as looks:
            async for _ in looks:
                self.look(changed)

    def look(self, changed: Callable[[bool], None] = lambda halted: None) -> None:
        for record in self._news():
            if record.attempt not in (0, self._attempt):
                continue
            if not record.clear:
                self._halted_by = record.signal_id
            elif record.signal_id == self._halted_by:
                self._halted_by = ""
            changed(self.halted)
            self._answer(record)

    def _news(self) -> list[EmergencyRecord]:
        try:
            if self._page is None:
                page = EmergencyPage.open(self._run_dir / paths.EMERGENCY_PAGE)
                found = page.standing(self._attempt)
                self._page = page
            else:
                found = self._page.since(self._order)
        except PageError:
            return []  # not there yet, or just being written: looked at again
        if found:
            self._order = found[-1].order
        return found

    def _answer(self, record: EmergencyRecord) -> None:
        ack = EmergencyAck(
            version=1,
            signal_id=record.signal_id,
            run_uid=self._run_uid,
            attempt=self._attempt,
            rank=self._rank,
            participant=self._participant,
            stage=ACK_STAGE_DONE,  # nothing is left to do once it knows
            elapsed_ms=max(0.0, (time.monotonic_ns() - record.arrived_ns) / 1e6),
            clear=record.clear,
        )
        ack.time.GetCurrentTime()
        event = RuntimeEvent(
            writer=self._participant, monotonic_ns=time.monotonic_ns(), ack=ack, incident=record.signal_id
        )
        event.time.GetCurrentTime()
        if not self._journal.append(event):
            log.error("an answer found no room in the journal", extra={FIELD: record.signal_id})
