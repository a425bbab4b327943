"""A sidecar's own events: into the pod's journal, from where weatherlight puts them on the bus."""

import logging
import time
from pathlib import Path
from typing import Final

from esper_leyline import paths
from esper_leyline.events import Level, RunEvent, level_of
from esper_leyline.journal import JournalWriter
from esper_leyline.reasons import RunReason
from esper_leyline.v1.report_pb2 import Notice, RuntimeEvent

MAX_MESSAGE: Final = 1024

log = logging.getLogger(__name__)


class Narrator:
    """Of one sidecar. Never waits and never fails: what finds no room is in the log alone."""

    def __init__(self, run_dir: Path, writer: str) -> None:
        self._journal = JournalWriter(run_dir / paths.JOURNAL)
        self._writer = writer

    def say(
        self, event: RunEvent, reason: RunReason, message: str, *, level: Level = Level.INFO, incident: str = ""
    ) -> None:
        """`level` counts where the catalogue leaves it open."""
        level = level_of(event, level)
        told = RuntimeEvent(
            writer=self._writer,
            monotonic_ns=time.monotonic_ns(),
            name=event,
            level=f"TELEMETRY_LEVEL_{level}",
            incident=incident,
            notice=Notice(reason=reason, message=message[:MAX_MESSAGE], warning=level is not Level.INFO),
        )
        told.time.GetCurrentTime()
        try:
            kept = self._journal.append(told)
        except OSError as error:
            log.error("event %s is lost, the journal cannot be written: %s", event, error.strerror)
            return
        if not kept:
            log.error("event %s is lost, the journal is full", event)

    def close(self) -> None:
        self._journal.close()
