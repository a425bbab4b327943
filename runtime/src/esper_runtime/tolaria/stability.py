"""How well the run stands: breakers, conservative mode and the emergency level, behind one door.

The parts of Tolaria tell what went wrong or right; this module decides what may go on. It never acts on the model.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

from esper_leyline.events import Level
from esper_leyline.labels import TOLARIA
from esper_leyline.reasons import RunReason
from esper_leyline.v1.common_pb2 import CircuitBreakerState

from esper_runtime.checkpoint.wal import Kind
from esper_runtime.tolaria import levels
from esper_runtime.tolaria.breaker import CLOSED, OPEN, Breaker
from esper_runtime.tolaria.conservative import Conservative
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.levels import Change, Levels
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.telemetry import Events


class Part(StrEnum):
    """What has a breaker of its own; the label `name` of tolaria.breaker.state."""

    TAMIYO = "tamiyo"
    KASMINA = "kasmina"
    BOUNDARY_TIMING = "boundary_timing"
    LR_INTEGRITY = "lr_integrity"
    OPTIMIZER_REBUILD = "optimizer_rebuild"
    CHECKPOINT = "checkpoint"


class Stability(Protocol):
    """What the other parts of Tolaria may ask and tell."""

    @property
    def conservative(self) -> bool:
        """No optimizer rebuild, no profiling, no structural change; training, snapshots and checkpoints go on."""

    def allows(self, part: Part) -> bool:
        """Whether the protected call may be made now: closed, or the one probe of a half-open breaker.

        A denied call is no failure and is not to be told.
        """

    def succeeded(self, part: Part) -> None:
        """A protected call went well."""

    def failed(self, part: Part, why: str) -> None:
        """A protected call failed, or an integrity check did."""

    def anomaly(self, reason: RunReason, message: str) -> None:
        """A NaN, an infinity, a loss spike or a gradient explosion: level 3."""

    def rolled_back(self, reason: RunReason, message: str) -> None:
        """A rollback was done: level 3; open breakers become half-open."""

    def halted(self, reason: RunReason, message: str) -> None:
        """The run is going to halt by its own decision: level 4."""


class Calm:
    """Stands in where nothing is watched, such as in tests of one part: everything is allowed, nothing kept."""

    conservative = False

    def allows(self, part: Part) -> bool:
        return True

    def succeeded(self, part: Part) -> None:
        return

    def failed(self, part: Part, why: str) -> None:
        return

    def anomaly(self, reason: RunReason, message: str) -> None:
        return

    def rolled_back(self, reason: RunReason, message: str) -> None:
        return

    def halted(self, reason: RunReason, message: str) -> None:
        return


_LEVEL_OF_FAILURE: Final = {
    Part.TAMIYO: (levels.NOTICE, RunReason.SIDECAR_DOWN),
    Part.KASMINA: (levels.NOTICE, RunReason.SIDECAR_DOWN),
    Part.BOUNDARY_TIMING: (levels.NOTICE, RunReason.BOUNDARY_BUDGET_EXCEEDED),
    Part.LR_INTEGRITY: (levels.ELEVATED, RunReason.LEARNING_RATE_TAMPERED),
    Part.OPTIMIZER_REBUILD: (levels.NOTICE, RunReason.OPTIMIZER_REBUILD_FAILED),
    Part.CHECKPOINT: (levels.ELEVATED, RunReason.CHECKPOINT_FAILED),
}
_CONSERVATIVE_AT_ONCE: Final = frozenset({Part.TAMIYO, Part.KASMINA, Part.LR_INTEGRITY})
"""Without waiting for their breaker to open."""
_LEVEL_OF_ANOMALY: Final = {
    RunReason.FEATURE_FALLBACK: levels.NOTICE,
    RunReason.VALIDATION_REGRESSION: levels.ELEVATED,
}
"""Any other anomaly is level 3."""
_ON_DEMAND: Final = frozenset({Part.OPTIMIZER_REBUILD})
"""Tried only when somebody asks for it, so an open breaker of it is over with its window."""
_LEVEL = "level"
_ADVICE = "tamiyo_advice"
_TOLD_FROM: Final = levels.ELEVATED
"""From this level on the run's status says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Halt:
    """Why a run is at level 4."""

    reason: RunReason
    message: str


class Standing:
    """The Stability of a trainer. `restarted`: an earlier trainer of this pod has run, so a halt is still in force."""

    def __init__(
        self,
        *,
        facts: Facts,
        events: Events,
        metrics: Metrics,
        run_seconds: Callable[[], float],
        restarted: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._facts = facts
        self._events = events
        self._metrics = metrics
        self._breakers = {part: Breaker(monotonic) for part in Part}
        self._mode = Conservative(monotonic)
        self._levels = Levels(facts.state.level, seconds=run_seconds, new_id=new_id)
        self._violated = False
        """The learning rate was found changed since the last boundary."""
        self._show()
        if not restarted:
            self._tell(self._levels.begin_again("a new pod"))
        if self.level >= _TOLD_FROM:
            self._degrade(f"level {self.level} ({levels.name_of(self.level)}) since before this trainer")
        self._follow_level()

    # What may go on

    @property
    def level(self) -> int:
        return self._levels.level

    @property
    def halt(self) -> Halt | None:
        """Why the run has to halt; None when it does not."""
        if self.level != levels.HALT:
            return None
        if self._levels.owed_to is None:
            return Halt(reason=RunReason.HALTED, message="halted before this trainer was started")
        return Halt(reason=self._levels.owed_to.reason, message=self._levels.owed_to.message)

    @property
    def conservative(self) -> bool:
        return bool(self._mode)

    @property
    def why_conservative(self) -> dict[str, str]:
        """Message by reason, oldest first."""
        return {reason: entry.message for reason, entry in self._mode.entries.items()}

    def state_of(self, part: Part) -> CircuitBreakerState:
        return self._breakers[part].state

    def ready(self, part: Part) -> bool:
        """`allows` would say yes. Asking changes nothing."""
        return self._breakers[part].ready

    def allows(self, part: Part) -> bool:
        allowed = self._breakers[part].allow()
        self._show_breaker(part)
        return allowed

    def give_back(self, part: Part) -> None:
        """A call that was allowed was not made."""
        self._breakers[part].give_back()

    def repaired(self, part: Part) -> None:
        """There is a sign that the part works again, such as a new process behind its socket: worth a probe."""
        self._breakers[part].half_open()
        self._show_breaker(part)

    # What happened

    def succeeded(self, part: Part) -> None:
        breaker = self._breakers[part]
        before = breaker.state
        breaker.succeeded()
        self._show_breaker(part)
        if breaker.state != CLOSED:
            return
        self._mode.succeeded(part)
        if before != CLOSED:
            self._events.notice(RunReason.BREAKER_CLOSED, f"breaker {part} closed: it works again")

    def failed(self, part: Part, why: str) -> None:
        breaker = self._breakers[part]
        before = breaker.state
        breaker.failed()
        self._show_breaker(part)
        if part is Part.LR_INTEGRITY:
            self._violated = True
        if part in _CONSERVATIVE_AT_ONCE:
            self._enter(part, f"{part}: {why}")
        level, reason = _LEVEL_OF_FAILURE[part]
        if breaker.state == OPEN and before != OPEN:
            self._opened(part, breaker, why)
            level, reason = levels.CONSERVATIVE, RunReason.BREAKER_OPENED
        self._cause(level, reason, f"{part}: {why}")

    def _opened(self, part: Part, breaker: Breaker, why: str) -> None:
        message = f"breaker {part} opened for {breaker.window_s:g} s after {breaker.failures} failures: {why}"
        self._events.notice(RunReason.BREAKER_OPENED, message, warning=True)
        self._enter(part, f"breaker {part} is open: {why}")

    def anomaly(self, reason: RunReason, message: str) -> None:
        self._cause(_LEVEL_OF_ANOMALY.get(reason, levels.CONSERVATIVE), reason, message)

    def rolled_back(self, reason: RunReason, message: str) -> None:
        for part, breaker in self._breakers.items():
            breaker.half_open()
            self._show_breaker(part)
        self._cause(levels.CONSERVATIVE, reason, message)

    def halted(self, reason: RunReason, message: str) -> None:
        self._cause(levels.HALT, reason, message)

    # What is commanded

    def force(self, part: Part, state: CircuitBreakerState, why: str) -> None:
        """ValueError for a state that is none."""
        breaker = self._breakers[part]
        before = breaker.state
        breaker.force(state)
        self._show_breaker(part)
        if breaker.state == OPEN and before != OPEN:
            self._opened(part, breaker, why)
            self._cause(levels.CONSERVATIVE, RunReason.BREAKER_OPENED, f"{part}: {why}")
        elif breaker.state == CLOSED and before != CLOSED:
            self._events.notice(RunReason.BREAKER_CLOSED, f"breaker {part} closed: {why}")

    def order_level(self, level: int, message: str) -> None:
        """By command. LevelError when it or its text is not valid, or it is not above the present level."""
        if levels.NONE < level <= self.level:
            raise levels.LevelError(f"the emergency level is already {self.level}; only health lowers it")
        self._tell(self._levels.cause(level, RunReason.TAMIYO_REQUEST, message))

    def advised(self, *, conservative: bool, message: str) -> None:
        """Tamiyo's word on the mode; in force until it says otherwise."""
        if conservative:
            self._enter(_ADVICE, message)
        else:
            self._lift(_ADVICE)

    # Boundaries

    def boundary(self, *, healthy: bool | None, failure: str = "") -> None:
        """After each: see Levels.boundary. Time in the mode, dwells and windows are looked at here alone."""
        if not self._violated and self.ready(Part.LR_INTEGRITY):
            self.succeeded(Part.LR_INTEGRITY)  # it is checked with every step, so silence says that it held
        self._violated = False
        was = self.conservative
        seconds = self._mode.seconds_since_asked()
        if was:
            self._metrics.add("tolaria.conservative.seconds_total", seconds)
        for part in _ON_DEMAND:
            if self.ready(part):
                self._mode.succeeded(part)
        self._mode.boundary()
        self._mode_changed(was)
        self._tell(self._levels.boundary(healthy=healthy, failure=failure, breakers_closed=self._all_quiet()))
        repeats = self._levels.repeats()
        if repeats is not None:
            message = (
                f"still level {self.level} ({levels.name_of(self.level)}), {repeats.count} more causes, the last: "
            )
            self._events.notice(
                RunReason.EMERGENCY_LEVEL_RAISED,
                message + repeats.message,
                warning=True,
                level=_severity(self.level),
            )

    def _all_quiet(self) -> bool:
        return all(
            breaker.state == CLOSED or (part in _ON_DEMAND and breaker.ready)
            for part, breaker in self._breakers.items()
        )

    # Carried by snapshots and checkpoints

    def capture(self) -> dict[str, Any]:
        """Breakers that are not at rest, and why the mode is on."""
        disturbed = {part: b.capture() for part, b in self._breakers.items() if b.state != CLOSED or b.failures}
        reasons = {reason: text for reason, text in self.why_conservative.items() if reason in set(Part)}
        return {"breakers": disturbed, "conservative": reasons}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """No breaker is open afterwards, and nothing that is known now is forgotten."""
        breakers = saved.get("breakers", {})
        for part, breaker in self._breakers.items():
            if part in breakers:
                breaker.restore(breakers[part])
            breaker.half_open()
            self._show_breaker(part)
        for reason, message in saved.get("conservative", {}).items():
            self._enter(reason, message)

    # Telling

    def _cause(self, level: int, reason: RunReason, message: str) -> None:
        self._tell(self._levels.cause(level, reason, levels.cut(message) or reason))

    def _tell(self, change: Change | None) -> None:
        if change is None:
            return
        self._facts.record(Kind.LEVEL, level=change.after, reason=change.reason, id=change.id)
        raised = change.after > change.before
        reason = RunReason.EMERGENCY_LEVEL_RAISED if raised else RunReason.EMERGENCY_LEVEL_LOWERED
        said = f"level {change.after} ({levels.name_of(change.after)})"
        because = f"{change.reason}: {change.message}" if raised else change.message
        message = f"{said} after {change.before}: {because} [{change.id}]"
        self._events.notice(reason, message, warning=raised, level=_severity(change.after))
        if change.after >= _TOLD_FROM:
            self._degrade(f"{said}: {because}")
        elif change.before >= _TOLD_FROM:
            self._events.degradation(TOLARIA, degraded=False, reason=reason, message=f"{said}: {change.message}")
        labels = {"from": str(change.before), "to": str(change.after), "reason": str(change.reason)}
        self._metrics.add("tolaria.emergency.transitions_total", 1.0, **labels)
        if change.after == levels.HALT:
            self._metrics.add("tolaria.emergency.halts_total")
        self._show()
        self._follow_level()

    def _degrade(self, message: str) -> None:
        # A way to train, not a broken part: what broke tells its own degradation.
        self._events.degradation(TOLARIA, degraded=True, reason=RunReason.CONSERVATIVE_MODE, message=message)

    def _follow_level(self) -> None:
        if self.level >= levels.CONSERVATIVE:
            self._enter(_LEVEL, f"emergency level {self.level}")
        else:
            self._lift(_LEVEL)

    def _enter(self, reason: str, message: str) -> None:
        was = self.conservative
        if not was:
            self._mode.seconds_since_asked()  # from now on it counts
        self._mode.enter(reason, message)
        self._mode_changed(was)

    def _lift(self, reason: str) -> None:
        was = self.conservative
        if was:
            self._metrics.add("tolaria.conservative.seconds_total", self._mode.seconds_since_asked())
        self._mode.lift(reason)
        self._mode_changed(was)

    def _mode_changed(self, was: bool) -> None:
        if was == self.conservative:
            return
        self._metrics.set("tolaria.mode.conservative", self.conservative)
        if was:
            self._events.notice(RunReason.CONSERVATIVE_MODE, "conservative mode is over")
            return
        why = "; ".join(self.why_conservative.values())
        self._events.notice(RunReason.CONSERVATIVE_MODE, f"conservative mode: {why}", warning=True)

    def _show(self) -> None:
        self._metrics.set("tolaria.emergency.level", self.level)
        self._metrics.set("tolaria.emergency.halt", self.level == levels.HALT)
        self._metrics.set("tolaria.mode.conservative", self.conservative)
        for part in Part:
            self._show_breaker(part)

    def _show_breaker(self, part: Part) -> None:
        self._metrics.set("tolaria.breaker.state", self._breakers[part].state, name=part)


def _severity(level: int) -> Level:
    """Of the word that the emergency level has risen: from conservative on it passes everything else on the bus."""
    return Level.CRITICAL if level >= levels.CONSERVATIVE else Level.WARNING
