"""Tamiyo's rules over any history."""

from itertools import pairwise

import hypothesis.strategies as st
from esper_runtime.tamiyo.policy import Action, Decision, Facts, Memory, PolicyConfig, advance
from hypothesis import given

CONFIG = PolicyConfig()

values = st.one_of(st.none(), st.floats(), st.sampled_from([0.5, 1.0, 1.05, 2.0, 30.0]))
boundaries = st.builds(Facts, step=st.integers(0, 50), training_loss=values, validation=values)


@given(st.lists(boundaries, max_size=60))
def test_invariants(history: list[Facts]) -> None:
    memory = Memory()
    scaled = []
    for number, facts in enumerate(history):
        before = memory
        memory, decision = advance(before, facts, CONFIG)
        assert decision.rationale
        assert len(decision.rationale.encode()) < 256
        assert decision.conservative == memory.conservative
        if decision.action is Action.SCALE_LEARNING_RATE:
            assert decision.conservative
            assert decision.learning_rate_scale == 0.5
            scaled.append(number)
        else:
            assert decision.learning_rate_scale is None
        if before.conservative and not memory.conservative:
            assert memory.healthy >= CONFIG.recovery
    assert len(scaled) <= CONFIG.max_scalings
    assert all(later - earlier >= CONFIG.dwell for earlier, later in pairwise(scaled))
    assert len(memory.losses) <= CONFIG.window


@given(st.lists(boundaries, min_size=1, max_size=30))
def test_equal_histories_give_equal_decisions(history: list[Facts]) -> None:
    assert repr(replay(history)) == repr(replay(history))


@given(st.floats(0.01, 100.0), st.integers(1, 40))
def test_a_run_that_improves_is_left_alone(start: float, epochs: int) -> None:
    history = [
        Facts(step=step, training_loss=start * 0.9**step, validation=start * 0.9**step) for step in range(epochs)
    ]
    assert {one.action for one in replay(history)} == {Action.NO_OPERATION}
    assert not any(one.conservative for one in replay(history))


def replay(history: list[Facts]) -> list[Decision]:
    memory, made = Memory(), []
    for facts in history:
        memory, decision = advance(memory, facts, CONFIG)
        made.append(decision)
    return made
