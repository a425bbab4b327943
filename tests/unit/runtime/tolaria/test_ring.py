import pytest
from esper_runtime.tolaria.ring import Held, slots_within, target, victim


def ring(*snapshots: tuple[int, bool]) -> list[Held]:
    """(step, good), oldest first."""
    return [Held(slot=i, generation=i + 1, step=step, good=good) for i, (step, good) in enumerate(snapshots)]


@pytest.mark.parametrize(
    ("snapshots", "step", "goes"),
    [
        ([(0, True), (10, False)], 20, 10),  # the only good one stays
        ([(0, True), (10, True)], 20, 0),
        ([(0, True), (10, True), (20, False)], 30, 0),  # an older good one matters less than a candidate
        ([(0, True), (10, False), (20, False)], 30, 10),
        ([(10, False), (20, False)], 30, 10),
        ([(0, True), (10, True), (20, True)], 30, 10),  # 0 is not yet too old, 10 is near 20
        ([(0, True), (20, True), (30, True)], 40, 20),
        ([(0, True), (30, True), (40, True)], 50, 0),  # older than 4 intervals
        ([(0, True), (8, True), (12, True), (14, True), (15, True)], 16, 8),  # all gaps alike: the oldest between
    ],
)
def test_what_a_new_snapshot_replaces(snapshots: list[tuple[int, bool]], step: int, goes: int):
    assert victim(ring(*snapshots), step=step).step == goes


@pytest.mark.parametrize("slots", [2, 3, 4, 8, 16])
def test_targets_reach_back_at_least_as_far_as_a_plain_queue_and_up_to_exponentially(slots: int):
    """Every snapshot is good by the time the next one is taken, as in healthy training."""
    held: list[Held] = []
    farthest = 0
    for turn in range(1, 400):
        if len(held) == slots:
            held.remove(victim(held, step=turn))
        held = [*held, Held(slot=0, generation=turn, step=turn, good=True)]
        for back in range(1, slots):
            if turn > slots:
                assert target(held, before_step=turn - back + 1), f"{back} back at {turn}"
        farthest = max(farthest, turn - min(snapshot.step for snapshot in held))
    assert farthest >= min(399 - 1, 2 ** (slots - 1)) - 1


def test_targets_are_good_older_than_the_first_suspect_step_and_newest_first():
    held = ring((10, True), (20, True), (30, True), (40, False))
    assert [snapshot.step for snapshot in target(held, before_step=30)] == [20, 10]
    assert [snapshot.step for snapshot in target(held, before_step=50)] == [30, 20, 10]
    assert target(held, before_step=10) == []


@pytest.mark.parametrize(("cap", "count"), [(99, 0), (199, 0), (200, 2), (299, 2), (300, 3), (1000, 4)])
def test_as_many_slots_as_fit_but_at_least_two(cap: int, count: int):
    assert slots_within(cap, slot_bytes=100, wanted=4) == count
