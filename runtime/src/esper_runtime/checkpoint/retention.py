"""Which generations stay. A pure function of what is known, so that every rule has a table test."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from esper_leyline.runconfig import Retention

Key: TypeAlias = tuple[int, int]
"""(attempt, number): the order of generations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One committed checkpoint."""

    attempt: int
    number: int
    step: int
    epoch: int
    path: Path
    size_bytes: int
    created: float
    """Unix seconds; for people."""
    aged_at: float = 0.0
    """Seconds on a clock that does not jump; only differences mean something."""
    suspect: bool = False
    """Saved while the loss was under suspicion."""
    files: int = 0
    """Without the manifest."""
    metrics: dict[str, float] = field(default_factory=dict)
    verified: bool = False
    """True when its bytes were read back (or loaded) by this process and matched."""
    corrupt: bool = False

    @property
    def key(self) -> Key:
        return (self.attempt, self.number)


def best(generations: Sequence[Generation], rule: Retention, count: int) -> list[Generation]:
    """The `count` best by the rule's metric, best first; of equals the newer one. Without the metric: not eligible."""
    sign = 1.0 if rule.mode == "Min" else -1.0
    measured = [g for g in generations if rule.metric in g.metrics and not g.corrupt and not g.suspect]
    by_age = sorted(measured, key=lambda g: g.key, reverse=True)
    return sorted(by_age, key=lambda g: sign * g.metrics[rule.metric])[:count]


def superfluous(generations: Sequence[Generation], rule: Retention) -> list[Generation]:
    """What may be deleted now, oldest first.

    Nothing at all before a verified good generation exists, and never the newest such one or anything newer, whatever
    the limits say. keepEverySteps keeps the first generation at or after each multiple of that many steps. The limits
    of age and size go before every other reason to keep one. Ages are counted back from that newest one, not from now:
    a run that does not save loses nothing, and no jump of a clock can.
    """
    ordered = sorted(generations, key=lambda g: g.key)
    good = [g for g in ordered if not g.corrupt and not g.suspect]
    verified = [g for g in good if g.verified]
    if not verified:
        return []
    newest = verified[-1]
    safe = {g.key for g in ordered if g.key >= newest.key}
    keep = {g.key for g in good[-max(rule.keep_latest, 1) :]}
    keep |= {g.key for g in best(good, rule, rule.keep_best)}
    if rule.keep_every_steps > 0:
        keep |= _milestones(good, rule.keep_every_steps)
    kept = [g for g in ordered if g.key in keep and not _too_old(g, newest, rule)]
    keep = _within(rule.max_bytes, kept, [g for g in ordered if g.key in safe]) | safe
    return [g for g in ordered if g.key not in keep]


def _too_old(generation: Generation, newest: Generation, rule: Retention) -> bool:
    return 0 < rule.max_age_seconds < newest.aged_at - generation.aged_at


def _within(limit: int, kept: Sequence[Generation], safe: Sequence[Generation]) -> set[Key]:
    """The newest of `kept` that fit into `limit` bytes beside `safe`; all of them without a limit."""
    keys = {g.key for g in safe}
    room = limit - sum(g.size_bytes for g in safe)
    for generation in sorted((g for g in kept if g.key not in keys), key=lambda g: g.key, reverse=True):
        room -= generation.size_bytes
        if limit > 0 and room < 0:
            break
        keys.add(generation.key)
    return keys


def _milestones(sound: Sequence[Generation], every: int) -> set[Key]:
    first: dict[int, Generation] = {}
    for generation in sound:
        period = generation.step // every
        known = first.get(period)
        if period > 0 and (known is None or generation.step < known.step):
            first[period] = generation
    return {g.key for g in first.values()}
