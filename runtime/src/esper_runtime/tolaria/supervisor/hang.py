"""When a silent trainer counts as hung. Pure: told the time, never asking for it.

Time counts only while the supervisor itself was watching. Should the whole container have been frozen, the trainer
gets its full limit again afterwards.
"""

from dataclasses import dataclass

from esper_leyline.pages import Heartbeat
from esper_leyline.v1 import report_pb2 as pb

MAX_STRIDE_S = 2.5
"""The most that one look can add: a longer gap means that the watcher was not running either."""
_NOT_JUDGED = frozenset(
    {
        pb.RUNTIME_PHASE_UNSPECIFIED,
        pb.RUNTIME_PHASE_STARTING,
        pb.RUNTIME_PHASE_FROZEN,
        pb.RUNTIME_PHASE_HALTING,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HangLimits:
    heartbeat_s: float
    progress_s: float


class HangWatch:
    """Watches the heartbeats of one trainer process, from its start to its end."""

    def __init__(self, limits: HangLimits, *, now_s: float) -> None:
        self._limits = limits
        self._looked_s = now_s
        self._beat_ns: int | None = None
        self._step: int | None = None
        self._silent_s = 0.0
        self._stuck_s = 0.0

    @property
    def silent_s(self) -> float:
        """Watched seconds since the newest beat."""
        return self._silent_s

    def look(self, beat: Heartbeat | None, *, now_s: float) -> str:
        """Why the trainer counts as hung, or nothing. `beat` is its newest; None before its first."""
        stride = min(max(0.0, now_s - self._looked_s), MAX_STRIDE_S)
        self._looked_s = now_s
        if beat is None:
            return ""
        fresh = beat.beat_ns != self._beat_ns
        self._beat_ns = beat.beat_ns
        if beat.phase in _NOT_JUDGED:
            self._silent_s = self._stuck_s = 0.0
            self._step = None
            return ""
        self._silent_s = 0.0 if fresh else self._silent_s + stride
        moving = beat.step != self._step or beat.phase != pb.RUNTIME_PHASE_RUNNING or beat.validating
        self._stuck_s = 0.0 if moving else self._stuck_s + stride
        self._step = beat.step
        if self._silent_s > self._limits.heartbeat_s:
            return (
                f"no heartbeat for {self._limits.heartbeat_s:g} s (health.heartbeatTimeoutSeconds) at step {beat.step}"
            )
        if self._stuck_s > self._limits.progress_s:
            return (
                f"no new step for {self._limits.progress_s:g} s (health.progressTimeoutSeconds) after step {beat.step}"
            )
        return ""
