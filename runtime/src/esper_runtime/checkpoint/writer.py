"""Saves beside training: one thread, at most one generation waiting, the newest wins."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from esper_runtime.checkpoint.errors import SaveError
from esper_runtime.checkpoint.generation import GenerationData
from esper_runtime.checkpoint.retention import Generation
from esper_runtime.checkpoint.store import Store

MAX_OUTCOMES = 256
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SaveOutcome:
    """How one submitted save ended. From now on its tensors may change again."""

    step: int
    generation: Generation | None = None
    replaced: bool = False
    """True when a newer submission took its place before it was begun."""
    error: str = ""
    errno: int | None = None
    seconds: float = 0.0

    @property
    def saved(self) -> bool:
        return self.generation is not None


class Writer:
    """Runs Store.save in a thread of its own. Nothing it meets is ever raised in the caller: it becomes an outcome."""

    def __init__(self, store: Store, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._monotonic = monotonic
        self._changed = threading.Condition()
        self._pending: GenerationData | None = None
        self._busy = False
        self._closing = False
        self._outcomes: deque[SaveOutcome] = deque(maxlen=MAX_OUTCOMES)
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """True when nothing is being written and nothing waits."""
        with self._changed:
            return not self._busy and self._pending is None

    def submit(self, data: GenerationData) -> None:
        """Asks for a save and returns at once. A save that still waits is given up in favour of this one."""
        with self._changed:
            self._give_up_pending()
            if self._closing or not self._thread.is_alive():
                self._outcomes.append(SaveOutcome(step=data.step, error="the checkpoint writer has ended"))
                data.release()
                return
            self._pending = data
            self._changed.notify_all()

    def retract(self) -> None:
        """Gives up the save that still waits, if any, so that its memory is free."""
        with self._changed:
            self._give_up_pending()

    def _give_up_pending(self) -> None:
        if self._pending is not None:
            self._outcomes.append(SaveOutcome(step=self._pending.step, replaced=True))
            self._pending.release()
            self._pending = None

    def drain(self, timeout_s: float) -> bool:
        """Waits until everything submitted is saved or has failed. False when that takes longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and self._pending is None, timeout_s)

    def poll(self) -> list[SaveOutcome]:
        """Outcomes since the last call, oldest first."""
        with self._changed:
            outcomes = list(self._outcomes)
            self._outcomes.clear()
            return outcomes

    def close(self, timeout_s: float = 0.0) -> bool:
        """Takes no more work and waits for what was submitted. False when it did not end in time (then abandoned)."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (data := self._next()) is not None:
            outcome = SaveOutcome(step=data.step, error="the checkpoint writer failed; see its log")
            try:
                outcome = self._save(data)
            finally:
                data.release()
                with self._changed:
                    self._busy = False
                    self._outcomes.append(outcome)
                    self._changed.notify_all()

    def _next(self) -> GenerationData | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pending is not None or self._closing)
            data, self._pending = self._pending, None
            self._busy = data is not None
            return data

    def _save(self, data: GenerationData) -> SaveOutcome:
        begun = self._monotonic()
        try:
            generation = self._store.save(data)
        except SaveError as error:
            log.error("%s", error)
            return SaveOutcome(step=data.step, error=str(error), errno=error.errno, seconds=self._monotonic() - begun)
        except MemoryError:
            return SaveOutcome(step=data.step, error="not enough memory to write the checkpoint")
        return SaveOutcome(step=data.step, generation=generation, seconds=self._monotonic() - begun)
