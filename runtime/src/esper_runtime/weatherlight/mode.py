"""Whether this pod works as it should: one of two modes, from everything that is known to be wrong.

Degraded while a worker of weatherlight waits to be started again, has stopped, or has failed within the last CALM_S;
while Redis cannot be reached or is not as it must be; and while the trainer says that some part of it does not work,
that a breaker is open or that it is conservative. Operational otherwise. Workers are told to the operator as the
degradation of component weatherlight; all others are degradations already, so the run's condition Healthy says it too.
"""

from typing import Final

from esper_leyline.events import Level, RunEvent
from esper_leyline.labels import WEATHERLIGHT
from esper_leyline.reasons import RunReason

from esper_runtime.sidecar.narrator import Narrator
from esper_runtime.weatherlight.clock import Clock, Moment
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.recorder import Recorder

CALM_S: Final = 300.0
"""A worker that has failed is forgiven after so long without another failure."""


class SystemMode:
    """The Observer of weatherlight's workers."""

    def __init__(self, recorder: Recorder, narrator: Narrator, metrics: Metrics, clock: Clock) -> None:
        self._recorder = recorder
        self._narrator = narrator
        self._metrics = metrics
        self._clock = clock
        self._waiting: set[str] = set()
        """Workers that will be started again."""
        self._stopped: set[str] = set()
        self._failed_at: Moment | None = None
        self._last_failure = ""
        self._degraded = False

    # As observer

    def started(self, worker: str, *, again: bool) -> None:
        self._waiting.discard(worker)
        self._metrics.worker_started(worker, again=again)
        if again:
            message = f"worker {worker} was started again"
            self._narrator.say(RunEvent.WORKER_RESTARTED, RunReason.WORKER_FAILED, message)

    def failed(self, worker: str, why: str, delay_s: float) -> None:
        self._waiting.add(worker)
        at = self._trouble(worker, why)
        self._metrics.worker_waits(worker, delay_s, failed_at=at.time.timestamp())

    def stopped(self, worker: str) -> None:
        self._stopped.add(worker)
        at = self._trouble(worker, "it has returned and is not started again")
        self._metrics.worker_stopped(worker, failed_at=at.time.timestamp())

    def crash_loop(self, worker: str, why: str) -> None:
        message = f"worker {worker} of weatherlight: {why}; the container ends"
        self._metrics.worker_stopped(worker, failed_at=self._clock().time.timestamp())
        self._narrator.say(RunEvent.WORKER_CRASH_LOOP, RunReason.WORKER_FAILED, message)
        self._recorder.notice(RunReason.WORKER_FAILED, message, warning=True)

    def _trouble(self, worker: str, why: str) -> Moment:
        self._failed_at = at = self._clock()
        self._last_failure = f"worker {worker}: {why}"
        self._narrator.say(RunEvent.WORKER_ERROR, RunReason.WORKER_FAILED, self._last_failure)
        self.look()
        return at

    # By looking

    def look(self) -> None:
        """Call it now and then: what ends by itself is noticed here."""
        trouble = self._of_workers()
        if trouble:
            self._recorder.degraded(WEATHERLIGHT, RunReason.WORKER_FAILED, trouble)
        else:
            self._recorder.restored(WEATHERLIGHT)
        degraded = self._recorder.reporter.degradations
        if bool(degraded) == self._degraded:
            return
        self._degraded = bool(degraded)
        self._metrics.mode(degraded=self._degraded)
        if degraded:
            message = f"degraded: {', '.join(sorted(degraded))}"
            self._narrator.say(RunEvent.SYSTEM_MODE_CHANGED, RunReason.SYSTEM_DEGRADED, message, level=Level.WARNING)
        else:
            self._narrator.say(RunEvent.SYSTEM_MODE_CHANGED, RunReason.SYSTEM_OPERATIONAL, "operational")

    def _of_workers(self) -> str:
        """What is wrong with them; empty when nothing is, and nothing was of late."""
        if self._stopped:
            return f"stopped: {', '.join(sorted(self._stopped))}"
        if self._failed_at is None:
            return ""
        calm_ns = self._clock().monotonic_ns - self._failed_at.monotonic_ns
        if self._waiting or calm_ns < CALM_S * 1e9:
            return self._last_failure
        self._failed_at = None
        return ""
