"""Whether a volume is fast and large enough for a state, from what real saves and loads took."""

import statistics
from collections import deque
from dataclasses import dataclass, field

from esper_leyline.runconfig import Retention

MAX_SAMPLES = 16
_MIB = 1 << 20


@dataclass(slots=True)
class Rate:
    """Bytes per second of the newest transfers."""

    samples: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))

    def add(self, size: int, seconds: float) -> None:
        if size > 0 and seconds > 0:
            self.samples.append(size / seconds)

    @property
    def bytes_per_s(self) -> float | None:
        """The median; None before the first transfer."""
        return statistics.median(self.samples) if self.samples else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What is asked of the volume, and what it did last. None: not known, and no obstacle."""

    size_bytes: int
    """Of one checkpoint."""
    count: int
    """Checkpoints on the volume."""
    total_bytes: int
    save_seconds: float
    """The last save, verification included."""
    free_bytes: int | None
    read_bytes_per_s: float | None
    deadline_seconds: float
    """rollback.fullDeadlineSeconds"""
    period_seconds: float | None
    """Between two saves, as the cadence asks for them."""
    rule: Retention


def obstacles(demand: Demand) -> dict[str, str]:
    """Why the volume does not do, by kind (read, save, space), each with its numbers. Empty: it does."""
    found = {"read": _read(demand), "save": _save(demand), "space": _space(demand)}
    return {kind: text for kind, text in found.items() if text}


def _read(demand: Demand) -> str:
    rate = demand.read_bytes_per_s
    if rate is None or demand.size_bytes / rate <= demand.deadline_seconds:
        return ""
    return (
        f"a full rollback would read {demand.size_bytes / _MIB:.1f} MiB at {rate / _MIB:.1f} MiB/s: "
        f"{demand.size_bytes / rate:.1f} s, more than rollback.fullDeadlineSeconds ({demand.deadline_seconds:g} s)"
    )


def _save(demand: Demand) -> str:
    if demand.period_seconds is None or demand.save_seconds <= demand.period_seconds:
        return ""
    return (
        f"the last save took {demand.save_seconds:.1f} s, but a checkpoint is asked for every "
        f"{demand.period_seconds:.1f} s: saves are left out"
    )


def _space(demand: Demand) -> str:
    """A new checkpoint is written before an old one goes, so there must be room for one more than are kept."""
    if demand.free_bytes is None:
        return ""
    rule = demand.rule
    missing = max(0, max(rule.keep_latest, 1) + rule.keep_best - demand.count)
    growth = missing * demand.size_bytes
    if rule.max_bytes > 0:
        growth = min(growth, max(0, rule.max_bytes - demand.total_bytes))
    needed = growth + demand.size_bytes
    if needed <= demand.free_bytes:
        return ""
    return (
        f"checkpoint.retention needs {needed / _MIB:.1f} MiB more for checkpoints of "
        f"{demand.size_bytes / _MIB:.1f} MiB; the volume has {demand.free_bytes / _MIB:.1f} MiB free"
    )
