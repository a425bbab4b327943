"""Which snapshots to keep: pure decisions about slots, no memory is touched.

The newest good one stays, whatever happens; then candidates; then older good ones, thinned so that their ages grow
like powers of two. So a target from before the first suspect step exists even when the trouble is noticed late, and
there is a near one when it is noticed at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A sealed slot, as its header tells."""

    slot: int
    generation: int
    step: int
    good: bool


def victim(held: Sequence[Held], *, step: int) -> Held:
    """Of these, at least one, the snapshot that a new one of `step` replaces."""
    by_age = sorted(held, key=lambda snapshot: snapshot.generation)
    good = [snapshot for snapshot in by_age if snapshot.good]
    candidates = [snapshot for snapshot in by_age if not snapshot.good]
    if len(good) > 1:
        return _most_spare(good, step=step, slots=len(held))
    return candidates[0] if candidates else good[0]


def _most_spare(good: Sequence[Held], *, step: int, slots: int) -> Held:
    """Of good ones, oldest first: the oldest when it is too old, else the one between that leaves the smallest gap."""
    *older, newest = good
    if len(older) == 1:
        return older[0]
    horizon = max(1, step - newest.step) * 2 ** (slots - 1)
    if step - older[0].step > horizon:
        return older[0]

    def gap(index: int) -> float:
        """Age of the next older one in units of that of the next newer one, if this one goes."""
        newer = good[index + 1]
        return (step - good[index - 1].step) / max(1, step - newer.step)

    return good[min(range(1, len(older)), key=gap)]


def target(held: Sequence[Held], *, before_step: int) -> list[Held]:
    """What a rollback may go back to, best first: good ones of a step below `before_step`, newest first."""
    fit = [snapshot for snapshot in held if snapshot.good and snapshot.step < before_step]
    return sorted(fit, key=lambda snapshot: -snapshot.generation)


def slots_within(cap_bytes: int, *, slot_bytes: int, wanted: int) -> int:
    """How many slots of this size the cap allows: `wanted`, or as many as fit, or 0 when two do not."""
    fit = min(wanted, cap_bytes // slot_bytes)
    return fit if fit >= 2 else 0
