"""The supervisor's lines in the run's record.

The trainer owns the record while it lives, so what is told meanwhile waits here. With the trainer gone all of it is
written at once, and the file is left to the next trainer: a line that was written is there whatever dies next, and one
that waited goes with the supervisor, as the trainer's own do with the trainer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper_leyline.events import Level, RunEvent
from esper_leyline.v1 import report_pb2 as pb

from esper_runtime.tolaria.narrate import tell
from esper_runtime.tolaria.record import SUPERVISOR, Author, Backlog, Sink

MAX_WAITING = 256


class Lines:
    """Of one container. `step` is where training is, for events that do not say."""

    def __init__(self, path: Path, *, attempt: int, incarnation: int, step: Callable[[], int]) -> None:
        self._step = step
        self._backlog = Backlog(MAX_WAITING)
        self._sink = Sink(path, Author(attempt=attempt, incarnation=incarnation, trainer_start=SUPERVISOR))

    def add(self, event: RunEvent, *, level: Level, step: int | None = None, **fields: Any) -> None:
        """Keeps a line for the next `write`."""
        self._backlog.add(event, step=self._step() if step is None else step, level=level, fields=fields)

    def tell(self, event: pb.RuntimeEvent) -> None:
        """The same for an event of the journal, in the record's words."""
        for told in tell(event):
            self.add(told.event, level=told.level, step=told.step, **told.fields)

    def write(self) -> None:
        """Call it only while no trainer lives. A volume that fails is logged, and the next line tells what was lost.

        Nothing is synchronised: the kernel has the lines, and a restart does not wait for a disk on their account.
        """
        if len(self._backlog):
            self._sink.write(*self._backlog.take())
            self._sink.close(sync=False)
