"""What retention promises whatever the history."""

from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
from esper_leyline.runconfig import Retention
from esper_runtime.checkpoint.retention import Generation, superfluous
from hypothesis import given, settings


@st.composite
def histories(draw: st.DrawFn) -> list[Generation]:
    made = []
    for number in range(1, draw(st.integers(0, 25)) + 1):
        corrupt = draw(st.booleans()) and draw(st.booleans())
        made.append(
            Generation(
                attempt=1 + number // draw(st.integers(5, 30)) if not made else made[-1].attempt,
                number=number,
                step=draw(st.integers(0, 500)),
                epoch=0,
                path=Path(str(number)),
                size_bytes=draw(st.integers(1, 50)),
                created=0.0,
                aged_at=draw(st.floats(-1e10, 1e10)),
                suspect=not corrupt and draw(st.integers(0, 4)) == 0,
                metrics={"loss": draw(st.floats(-5, 5))} if draw(st.booleans()) else {},
                verified=not corrupt and draw(st.booleans()),
                corrupt=corrupt,
            )
        )
    return made


RULES = st.builds(
    Retention,
    keep_latest=st.integers(1, 5),
    keep_best=st.integers(0, 3),
    keep_every_steps=st.integers(0, 200),
    max_age_seconds=st.just(0),
    mode=st.sampled_from(["Min", "Max"]),
)


@settings(max_examples=200, deadline=None)
@given(history=histories(), rule=RULES)
def test_what_is_needed_is_never_deleted(history: list[Generation], rule: Retention):
    doomed = {g.key for g in superfluous(history, rule)}
    left = [g for g in history if g.key not in doomed]
    sound = [g for g in history if not g.corrupt and not g.suspect]
    verified = [g for g in sound if g.verified]
    if not verified:
        assert not doomed
        return
    assert verified[-1] in left
    assert all(g in left for g in history if g.key > verified[-1].key)
    assert all(g in left for g in sound[-rule.keep_latest :])
    measured = [g.metrics["loss"] for g in sound if "loss" in g.metrics]
    if rule.keep_best and measured:
        best = min(measured) if rule.mode == "Min" else max(measured)
        assert any(g.metrics.get("loss") == best for g in left)


@settings(max_examples=200, deadline=None)
@given(history=histories(), rule=RULES)
def test_deleting_twice_deletes_nothing_more(history: list[Generation], rule: Retention):
    doomed = {g.key for g in superfluous(history, rule)}
    assert superfluous([g for g in history if g.key not in doomed], rule) == []


@settings(max_examples=200, deadline=None)
@given(history=histories(), rule=RULES)
def test_the_volume_is_bounded(history: list[Generation], rule: Retention):
    """When all are verified, no more stays than the rule counts."""
    sound = [g for g in history if not g.corrupt and not g.suspect]
    verified = [Generation(**{**_fields(g), "verified": True}) for g in sound]
    left = len(verified) - len(superfluous(verified, rule))
    milestones = 0 if not rule.keep_every_steps else 1 + 500 // rule.keep_every_steps
    assert left <= rule.keep_latest + rule.keep_best + milestones


LIMITS = st.builds(
    Retention,
    keep_latest=st.integers(1, 5),
    keep_best=st.integers(0, 3),
    keep_every_steps=st.integers(0, 200),
    max_age_seconds=st.integers(0, 10_000),
    max_bytes=st.integers(0, 200),
)


@settings(max_examples=300, deadline=None)
@given(history=histories(), rule=LIMITS, jumps=st.lists(st.sampled_from([-3600.0, 0.0, 3600.0]), min_size=30))
def test_no_limit_and_no_clock_takes_the_newest_good_one_or_anything_newer(
    history: list[Generation], rule: Retention, jumps: list[float]
):
    """Whatever the ages say: also when the clock jumped by an hour before each of them."""
    jumped = [replace(g, aged_at=g.aged_at + jump) for g, jump in zip(history, jumps, strict=False)]
    doomed = {g.key for g in superfluous(jumped, rule)}
    verified = [g for g in jumped if g.verified and not g.corrupt and not g.suspect]
    if not verified:
        assert not doomed
        return
    assert all(g.key not in doomed for g in jumped if g.key >= verified[-1].key)


@settings(max_examples=300, deadline=None)
@given(history=histories(), rule=LIMITS)
def test_what_may_stay_is_young_and_small_enough(history: list[Generation], rule: Retention):
    doomed = {g.key for g in superfluous(history, rule)}
    left = [g for g in history if g.key not in doomed]
    verified = [g for g in history if g.verified and not g.corrupt and not g.suspect]
    if not verified:
        return
    older = [g for g in left if g.key < verified[-1].key]
    if rule.max_age_seconds:
        assert all(verified[-1].aged_at - g.aged_at <= rule.max_age_seconds for g in older)
    if rule.max_bytes and older:
        assert sum(g.size_bytes for g in left) <= rule.max_bytes
    unlimited = {g.key for g in superfluous(history, replace(rule, max_age_seconds=0, max_bytes=0))}
    assert unlimited <= doomed, "a limit never makes anything stay"


def _fields(generation: Generation) -> dict[str, object]:
    return {name: getattr(generation, name) for name in Generation.__dataclass_fields__}
