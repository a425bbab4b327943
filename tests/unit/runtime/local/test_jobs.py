"""What becomes of a Job when its pod ends, by the policy in its manifest."""

import pytest
from esper_runtime.local.jobs import failure_action

POLICY = {
    "rules": [
        {"action": "Ignore", "onExitCodes": {"containerName": "tolaria", "operator": "In", "values": [143]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "tolaria", "operator": "NotIn", "values": [0]}},
    ]
}


@pytest.mark.parametrize(
    ("exit_codes", "action"),
    [
        ({"tolaria": 143}, "Ignore"),
        ({"tolaria": 137}, "FailJob"),
        ({"tolaria": 75}, "FailJob"),
        ({"other": 143}, "Count"),
        ({}, "Count"),
    ],
)
def test_the_first_rule_that_matches_decides(exit_codes, action):
    assert failure_action(POLICY, exit_codes) == action


def test_without_a_policy_a_failure_counts():
    assert failure_action(None, {"tolaria": 1}) == "Count"
