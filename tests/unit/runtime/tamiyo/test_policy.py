"""Tamiyo's rules, boundary by boundary."""

import math
from collections.abc import Iterable

import pytest
from esper_leyline.v1.command_pb2 import RiskReason
from esper_runtime.tamiyo.policy import Action, Decision, Facts, Memory, PolicyConfig, advance

CONFIG = PolicyConfig()
QUIET = PolicyConfig(noise_factor=0.0)
"""For tests of the fixed margins alone."""
NAN = math.nan


def decisions(facts: Iterable[Facts], config: PolicyConfig = CONFIG) -> list[Decision]:
    memory, made = Memory(), []
    for one in facts:
        memory, decision = advance(memory, one, config)
        made.append(decision)
    return made


def validations(*values: float | None) -> list[Facts]:
    return [Facts(step=step, training_loss=1.0, validation=value) for step, value in enumerate(values)]


def trainings(*losses: float | None) -> list[Facts]:
    return [Facts(step=step, training_loss=loss) for step, loss in enumerate(losses)]


def actions(made: list[Decision]) -> str:
    """N(o operation), S(cale), R(ollback); lower case outside of conservative mode."""
    letters = {Action.NO_OPERATION: "n", Action.SCALE_LEARNING_RATE: "s", Action.ROLLBACK: "r"}
    return "".join(letters[one.action].upper() if one.conservative else letters[one.action] for one in made)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param((3.0, 2.0, 1.0, 0.5), "nnnn", id="falling"),
        pytest.param((1.0, 1.09, 0.95, 1.04, 1.0), "nnnnn", id="noise within the delta"),
        pytest.param((1.0, 2.0, 2.0, 0.9, 2.0, 2.0), "nnnnnn", id="two bad ones are no regression"),
        pytest.param((1.0, 1.2, 1.3, 1.4), "nnnS", id="patience is 3"),
        pytest.param((1.0, 1.2, 1.2, 1.2), "nnnS", id="worse but flat"),
        pytest.param((1.0, 1.2, NAN, math.inf), "nnnS", id="not finite is worse"),
        pytest.param((NAN, NAN, NAN), "nnS", id="never finite"),
        pytest.param((0.001, 0.004, 0.004, 0.005, 0.004), "nnnnn", id="noise around zero"),
        pytest.param((-5.0, -4.0, -4.0, -4.0), "nnnS", id="negative losses"),
        pytest.param((1.0, None, None, None, None), "nnnnn", id="no validation says nothing"),
        pytest.param((1.0, 1.2, None, 1.2, None, 1.2), "nnnnnS", id="unknown neither heals nor hurts"),
    ],
)
def test_validation_is_judged_against_the_best_with_patience(values: tuple[float, ...], expected: str) -> None:
    assert actions(decisions(validations(*values))) == expected


# Validation losses of esper_runtime.workloads.digits, width 16, seeds 0 to 3: all end above 0.98 accuracy.
DIGITS = """
1.0422 0.3204 0.2164 0.1121 0.1028 0.0893 0.0916 0.0539 0.0449 0.0370 0.0440 0.0346 0.0486 0.0343 0.0244 0.0263 0.0255
0.0199 0.0147 0.0314 0.0303 0.0131 0.0202 0.0229 0.0205 0.0109 0.0590 0.0299 0.0083 0.0154

1.0917 0.3888 0.1566 0.1173 0.1389 0.0726 0.1105 0.0632 0.0745 0.1246 0.0895 0.0486 0.0599 0.0676 0.0520 0.0382 0.0543
0.0557 0.0620 0.0519 0.0525 0.0484 0.0404 0.0605 0.0598 0.0391 0.0539 0.0274 0.0316 0.0610

0.9601 0.2818 0.1840 0.0913 0.0489 0.0623 0.0413 0.0330 0.0543 0.0421 0.0269 0.0439 0.0325 0.0324 0.0229 0.0169 0.0221
0.0371 0.0237 0.0222 0.0155 0.0100 0.0203 0.0097 0.0182 0.0277 0.0303 0.0379 0.0098 0.0143

0.7948 0.2791 0.1563 0.1651 0.1021 0.0807 0.0943 0.0654 0.0672 0.0576 0.0798 0.0492 0.0492 0.0405 0.0402 0.0322 0.0441
0.0986 0.0788 0.0822 0.0556 0.0333 0.0572 0.0553 0.0636 0.0268 0.0415 0.0371 0.0464 0.0421
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_whose_validation_jumps_is_left_alone(seed: int) -> None:
    values = [float(word) for word in DIGITS.split("\n\n")[seed].split()]
    assert actions(decisions(validations(*values))) == "n" * 30


def test_a_bump_that_lasts_is_one_spell_of_conservative_mode() -> None:
    """Seed 3 has one: three epochs at three times the loss."""
    values = [float(word) for word in DIGITS.split("\n\n")[3].split()]
    assert actions(decisions(validations(*values))) == "n" * 19 + "SNNNNN" + "n" * 5


@pytest.mark.parametrize("seed", range(3))
def test_a_regression_after_a_healthy_course_is_seen_through_the_noise(seed: int) -> None:
    values = [float(word) for word in DIGITS.split("\n\n")[seed].split()]
    made = actions(decisions(validations(*values, *(value * 8 for value in values[-12:]))))
    assert made[:30] == "n" * 30
    assert "S" in made[30:36]


def test_a_value_at_the_threshold_does_not_make_the_mode_flicker() -> None:
    """Worse is above 1.1, healthy is at most 1.06: around 1.1 neither streak comes about."""
    at_the_edge = (1.09, 1.11) * 20
    assert actions(decisions(validations(1.0, 1.0, 1.0, *at_the_edge), QUIET)) == "n" * 43
    inside = decisions(validations(1.0, 1.5, 1.5, 1.5, *at_the_edge), QUIET)
    assert all(one.conservative for one in inside[3:])


def test_a_regression_says_what_and_why() -> None:
    last = decisions(validations(1.0, 1.2, 1.3, 1.4))[-1]
    assert last == Decision(
        action=Action.SCALE_LEARNING_RATE,
        risk=RiskReason.RISK_REASON_VALIDATION_REGRESSION,
        conservative=True,
        rationale="validation loss 1.4 is worse than the best of 1, 3 in a row: learning rate times 0.5",
        learning_rate_scale=0.5,
    )


def test_the_learning_rate_is_scaled_once_per_dwell_and_never_without_end() -> None:
    made = actions(decisions(validations(1.0, *[2.0] * 40)))
    scaled = [boundary for boundary, letter in enumerate(made) if letter == "S"]
    assert scaled == [3, 8, 13, 18]
    assert set(made[3:]) == {"S", "N"}  # conservative to the end: it never healed


def test_conservative_mode_ends_after_healthy_boundaries_in_a_row() -> None:
    values = (1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0)
    assert actions(decisions(validations(*values))) == "nnnSNNNNNnn"


def test_a_second_regression_soon_after_waits_for_the_dwell() -> None:
    values = (1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0)
    assert actions(decisions(validations(*values))) == "nnnSNNnnnS"
    slow = PolicyConfig(dwell=20)
    assert actions(decisions(validations(*values), slow)) == "nnnSNNnnnN"


@pytest.mark.parametrize("broken", [NAN, math.inf, -math.inf])
def test_a_training_loss_that_is_not_finite_is_rolled_back_every_time(broken: float) -> None:
    made = decisions(trainings(1.0, broken, broken, 1.0, 1.0, 1.0))
    assert actions(made) == "nRRNNn"
    assert made[1].risk == RiskReason.RISK_REASON_LOSS_SPIKE
    assert made[1].rationale == f"training loss is {broken}: roll back"


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        pytest.param((1.0, 0.9, 0.8, 30.0), "nnnR", id="exploded"),
        pytest.param((1.0, 0.9, 0.8, 9.0), "nnnn", id="bad but within the factor"),
        pytest.param((1.0, 0.9, 30.0), "nnn", id="too little history to say"),
        pytest.param((30.0, 0.9, 0.8, 0.7, 0.6, 29.0), "nnnnnn", id="no worse than it has been"),
        pytest.param((1.0, 1e-6, 1e-6, 1e-6, 1e-6, 1e-4), "nnnnnn", id="tiny losses far below the first"),
        pytest.param((0.0, 0.0, 0.0, 0.0), "nnnn", id="zeros"),
        pytest.param((-5.0, -5.0, -5.0, 60.0), "nnnR", id="negative losses"),
        pytest.param((1.0, 0.9, 0.8, 30.0, 30.0, 30.0, 30.0, 30.0, 30.0), "nnnRNNNNR", id="once per dwell"),
        pytest.param((None, None, None, None), "nnnn", id="unknown"),
    ],
)
def test_an_explosion_is_told_from_a_bad_epoch(losses: tuple[float, ...], expected: str) -> None:
    assert actions(decisions(trainings(*losses))) == expected


def test_a_rollback_comes_before_a_scaling() -> None:
    facts = [*validations(1.0, 2.0, 2.0), Facts(step=3, training_loss=NAN, validation=2.0)]
    last = decisions(facts)[-1]
    assert last.action is Action.ROLLBACK
    assert last.learning_rate_scale is None


def test_streaks_end_where_training_goes_back() -> None:
    back = [Facts(step=step, training_loss=1.0, validation=value) for step, value in
            ((0, 1.0), (1, 2.0), (2, 2.0), (1, 2.0), (2, 2.0), (3, 2.0))]  # fmt: skip
    assert actions(decisions(back)) == "nnnnnS"


def test_values_of_another_metric_are_not_compared() -> None:
    loss = validations(0.1, 0.1)
    rate = [Facts(step=step, training_loss=1.0, validation=0.9, metric="error rate") for step in range(2, 8)]
    made = decisions([*loss, *rate])
    assert actions(made) == "n" * 8
    assert made[2].rationale == "error rate 0.9 is the best so far"


def test_every_decision_explains_itself() -> None:
    facts = [*validations(1.0, 1.05, 2.0, NAN, None), *trainings(NAN)]
    rationales = [one.rationale for one in decisions(facts)]
    assert rationales == [
        "validation loss 1 is the best so far",
        "validation loss 1.05 is near the best of 1",
        "validation loss 2 is worse than the best of 1, 1 in a row",
        "validation loss nan is worse than the best of 1, 2 in a row",
        "no validation result to judge by",
        "training loss is nan: roll back",
    ]
