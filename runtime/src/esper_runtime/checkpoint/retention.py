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
    measured = [g for g in generations if rule.metric in g.metrics and not g.corrupt]
    by_age = sorted(measured, key=lambda g: g.key, reverse=True)
    return sorted(by_age, key=lambda g: sign * g.metrics[rule.metric])[:count]


def superfluous(generations: Sequence[Generation], rule: Retention) -> list[Generation]:
    """What may be deleted now, oldest first.

    Nothing at all before a verified generation exists, and never the newest verified one or anything newer.
    keepEverySteps keeps the first generation at or after each multiple of that many steps.
    """
    ordered = sorted(generations, key=lambda g: g.key)
    verified = [g for g in ordered if g.verified and not g.corrupt]
    if not verified:
        return []
    sound = [g for g in ordered if not g.corrupt]
    keep = {g.key for g in ordered if g.key >= verified[-1].key}
    keep |= {g.key for g in sound[-max(rule.keep_latest, 1) :]}
    keep |= {g.key for g in best(sound, rule, rule.keep_best)}
    if rule.keep_every_steps > 0:
        keep |= _milestones(sound, rule.keep_every_steps)
    return [g for g in ordered if g.key not in keep]


def _milestones(sound: Sequence[Generation], every: int) -> set[Key]:
    first: dict[int, Generation] = {}
    for generation in sound:
        period = generation.step // every
        known = first.get(period)
        if period > 0 and (known is None or generation.step < known.step):
            first[period] = generation
    return {g.key for g in first.values()}
