"""Asks Tamiyo and Kasmina at a boundary, unless a breaker says no, and tells how they stand what came of it."""

from dataclasses import dataclass, field
from typing import Final

from esper_leyline.events import Level, RunEvent
from esper_leyline.labels import KASMINA, TAMIYO
from esper_leyline.reasons import SUSPECT_COMMANDS, CommandRejection, RunReason
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket

from esper_runtime.checkpoint.wal import Kind
from esper_runtime.tolaria.breaker import OPEN
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.handshake import Boundary as Handshake
from esper_runtime.tolaria.handshake import BoundaryResult
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.stability import Part, Standing
from esper_runtime.tolaria.telemetry import Events

SIDECARS: Final = {KASMINA: Part.KASMINA, TAMIYO: Part.TAMIYO}
LATE: Final = {KASMINA: RunEvent.KASMINA_TIMEOUT, TAMIYO: RunEvent.TAMIYO_TIMEOUT}
GUARDED: Final = (Part.BOUNDARY_TIMING, Part.KASMINA, Part.TAMIYO)
"""Each of them has to be closed, or worth a probe, before anybody is asked."""


@dataclass(kw_only=True)
class Consult:
    """`handshake` None: there are no sidecars, and nothing to ask."""

    handshake: Handshake | None
    standing: Standing
    metrics: Metrics
    facts: Facts
    events: Events
    _asked_of: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Sockets of the sidecars as they were when these were asked last."""

    def ask(self, packet: SystemStatePacket) -> BoundaryResult | None:
        """Held for the soft deadline at most. None without sidecars."""
        handshake = self.handshake
        if handshake is None:
            return None
        self._look_for_repairs(handshake)
        if handshake.awaiting or not all(self.standing.ready(part) for part in GUARDED):
            return handshake.collect()
        for part in GUARDED:
            self.standing.allows(part)
        self._asked_of = handshake.signs_of_life()
        result = handshake.exchange(packet)
        if result.unasked:
            for part in GUARDED:
                self.standing.give_back(part)
        return result

    def _look_for_repairs(self, handshake: Handshake) -> None:
        """A new process behind the socket of a silent sidecar is worth a probe before the window is over."""
        silent = [name for name, part in SIDECARS.items() if self.standing.state_of(part) == OPEN]
        if not silent:
            return
        alive = handshake.signs_of_life()
        for name in silent:
            if alive[name] != self._asked_of.get(name) and any(alive[name]):
                self._asked_of[name] = alive[name]
                self.standing.repaired(SIDECARS[name])

    def account(self, result: BoundaryResult) -> bool | None:
        """Takes up what went well. True: all that were asked answered; False: one did not; None: nothing is known.

        Bad news is for `report`, since it may go into the run's log, whose disk is none of the boundary's time.
        """
        for change in result.degradations:
            first = next((silence for silence in result.silent if silence.component == change.component), None)
            late = change.degraded and first is not None and first.timed_out
            self.events.degraded(change, name=LATE[change.component] if late else None)
        silent = {silence.component for silence in result.silent}
        for name in result.heard - silent:
            self.standing.succeeded(SIDECARS[name])
        timings = result.timings
        if timings.evaluate_ms is not None:
            self.metrics.set("tolaria.timeout.tamiyo_last_ms", timings.evaluate_ms)
        if timings.open_ms is not None:
            self.metrics.set("tolaria.timeout.kasmina_last_ms", timings.open_ms + (timings.submit_ms or 0.0))
        if silent:
            return False
        return True if result.heard else None

    def report(self, result: BoundaryResult) -> None:
        """Tells of refused commands and of silence."""
        for rejection in result.rejections:
            self.facts.record(Kind.REJECTED_COMMAND, reason=rejection)
            message = f"a command of Tamiyo was refused: {rejection}"
            late = RunEvent.COMMAND_EXPIRED if rejection is CommandRejection.EXPIRED else None
            self.events.notice(RunReason.COMMAND_REJECTED, message, warning=True, name=late, level=_level_of(rejection))
        silent = {silence.component for silence in result.silent}
        for silence in result.silent:
            if silence.timed_out:
                self.metrics.add(f"tolaria.timeout.{silence.component}_total")
                self.metrics.set(f"tolaria.timeout.{silence.component}_last_ms", 0.0)
            self.standing.failed(SIDECARS[silence.component], silence.message)
        if silent:
            for name in SIDECARS.keys() - result.heard - silent:
                self.standing.give_back(SIDECARS[name])  # nobody came to ask it


def _level_of(rejection: CommandRejection) -> Level:
    if rejection in SUSPECT_COMMANDS:
        return Level.CRITICAL
    return Level.WARNING if rejection is CommandRejection.HALTED else Level.ERROR
