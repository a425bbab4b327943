"""What the records of a run's log say, and what they add up to. Nothing here reads or writes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from esper_leyline.phases import RestoreOutcome
from esper_leyline.v1.report_pb2 import Counters

MAX_REMEMBERED = 1000
"""Rollback times and skipped positions kept in the state; older ones fall out, totals stay."""


class Kind(StrEnum):
    """What a record says. Fields in parentheses are those of `append`."""

    ROLLBACK = "rollback"
    """In-process rollback (cause, from_step, to_step, time: seconds of training), with what it changes for good
    (skipped: as positions of SKIP; scale: as of LEARNING_RATE, None where it stays)."""
    SKIP = "skip"
    """Batches never to be trained on (positions: list of int; left_out: their steps count, see WalState)."""
    FAULT = "fault"
    """An injected fault has fired (key: str)."""
    LEARNING_RATE = "learning_rate"
    """The learning rate's scale from now on (scale)."""
    RESTART = "restart"
    """The trainer was started again inside its pod (cause, step)."""
    CHECKPOINT_FAILURE = "checkpoint_failure"
    """A save failed (step, error)."""
    REJECTED_COMMAND = "rejected_command"
    """(reason)"""
    REJECTED_SIGNAL = "rejected_signal"
    """(reason)"""
    STATE = "state"
    """All of the state at once; written by compaction."""
    RESTORE_FAILURE = "restore_failure"
    """A tier of rollback failed (outcome: esper_leyline.phases.RestoreOutcome, tier: RollbackTier)."""
    LEVEL = "level"
    """The emergency level from now on (level: 0 to 4, reason, id)."""
    BEGIN = "begin"
    """A save begins (txn, attempt, number, step, epoch; context: once per process)."""
    COMMIT = "commit"
    """It is on the volume, whole (txn, attempt, number, step, files; recovered: found so by the next start)."""
    ABORT = "abort"
    """It failed and left nothing (txn, error)."""
    # Its place in this list is a kind's number on disk: add at the end.


_RESTORE_COUNTERS = {
    RestoreOutcome.NO_CHECKPOINT: "restores_without_checkpoint",
    RestoreOutcome.INTEGRITY_FAILED: "restores_failed_integrity",
    RestoreOutcome.DEADLINE_EXCEEDED: "restores_over_deadline",
    RestoreOutcome.APPLY_FAILED: "restores_failed_apply",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WalState:
    """The sum of all records."""

    rollbacks: int = 0
    in_place_restarts: int = 0
    skipped_batches: int = 0
    checkpoint_failures: int = 0
    rejected_commands: int = 0
    rejected_signals: int = 0
    fired_faults: frozenset[str] = frozenset()
    learning_rate_scale: float = 1.0
    rollback_times: tuple[float, ...] = ()
    """In seconds of training, of the newest MAX_REMEMBERED rollbacks, oldest first."""
    restores_without_checkpoint: int = 0
    restores_failed_integrity: int = 0
    restores_over_deadline: int = 0
    restores_failed_apply: int = 0
    level: int = 0
    """EmergencyLevel; 0: none."""
    skipped_positions: tuple[int, ...] = ()
    """The newest MAX_REMEMBERED positions of skipped batches, in the order they were skipped."""
    left_out_positions: tuple[int, ...] = ()
    """As many of batches that were evaluated, at steps that count, and not applied; so they are when replayed."""

    def counters(self) -> Counters:
        return Counters(
            rollbacks=self.rollbacks,
            in_place_restarts=self.in_place_restarts,
            skipped_batches=self.skipped_batches,
            checkpoint_failures=self.checkpoint_failures,
            rejected_commands=self.rejected_commands,
            rejected_signals=self.rejected_signals,
            restores_without_checkpoint=self.restores_without_checkpoint,
            restores_failed_integrity=self.restores_failed_integrity,
            restores_over_deadline=self.restores_over_deadline,
            restores_failed_apply=self.restores_failed_apply,
        )

    def after(self, kind: Kind, fields: dict[str, Any]) -> "WalState":
        """The state with one more record. KeyError, TypeError or ValueError when a field is missing or of no use."""
        match kind:
            case Kind.ROLLBACK:
                return self._rolled_back(fields)
            case Kind.SKIP:
                return self._skipping(fields["positions"], left_out=bool(fields.get("left_out")))
            case Kind.FAULT:
                return replace(self, fired_faults=self.fired_faults | {str(fields["key"])})
            case Kind.LEARNING_RATE:
                return replace(self, learning_rate_scale=float(fields["scale"]))
            case Kind.RESTART:
                return replace(self, in_place_restarts=self.in_place_restarts + 1)
            case Kind.CHECKPOINT_FAILURE:
                return replace(self, checkpoint_failures=self.checkpoint_failures + 1)
            case Kind.REJECTED_COMMAND:
                return replace(self, rejected_commands=self.rejected_commands + 1)
            case Kind.REJECTED_SIGNAL:
                return replace(self, rejected_signals=self.rejected_signals + 1)
            case Kind.STATE:
                return _state_of(fields)
            case Kind.RESTORE_FAILURE:
                counter = _RESTORE_COUNTERS[RestoreOutcome(fields["outcome"])]
                return replace(self, **{counter: getattr(self, counter) + 1})
            case Kind.LEVEL:
                return replace(self, level=int(fields["level"]))
            case Kind.BEGIN | Kind.COMMIT | Kind.ABORT:
                return self

    def _rolled_back(self, fields: dict[str, Any]) -> "WalState":
        scale = fields.get("scale")
        return replace(
            self._skipping(fields.get("skipped", ()), left_out=False),
            rollbacks=self.rollbacks + 1,
            rollback_times=(*self.rollback_times, float(fields["time"]))[-MAX_REMEMBERED:],
            learning_rate_scale=self.learning_rate_scale if scale is None else float(scale),
        )

    def _skipping(self, positions: Iterable[Any], *, left_out: bool) -> "WalState":
        more = tuple(int(position) for position in positions)
        counted = replace(self, skipped_batches=self.skipped_batches + len(more))
        if left_out:
            return replace(counted, left_out_positions=(*self.left_out_positions, *more)[-MAX_REMEMBERED:])
        return replace(counted, skipped_positions=(*self.skipped_positions, *more)[-MAX_REMEMBERED:])

    def fields(self) -> dict[str, Any]:
        """Content of a STATE record."""
        return {
            "rollbacks": self.rollbacks,
            "in_place_restarts": self.in_place_restarts,
            "skipped_batches": self.skipped_batches,
            "checkpoint_failures": self.checkpoint_failures,
            "rejected_commands": self.rejected_commands,
            "rejected_signals": self.rejected_signals,
            "restores_without_checkpoint": self.restores_without_checkpoint,
            "restores_failed_integrity": self.restores_failed_integrity,
            "restores_over_deadline": self.restores_over_deadline,
            "restores_failed_apply": self.restores_failed_apply,
            "level": self.level,
            "fired_faults": sorted(self.fired_faults),
            "learning_rate_scale": self.learning_rate_scale,
            "rollback_times": list(self.rollback_times),
            "skipped_positions": list(self.skipped_positions),
            "left_out_positions": list(self.left_out_positions),
        }


def _state_of(fields: dict[str, Any]) -> WalState:
    tuples = {
        "rollback_times": tuple(fields["rollback_times"]),
        "skipped_positions": tuple(fields["skipped_positions"]),
        "left_out_positions": tuple(fields.get("left_out_positions", ())),
    }
    known = {name: value for name, value in fields.items() if name != "transactions"}
    return WalState(**{**known, **tuples, "fired_faults": frozenset(fields["fired_faults"])})
