"""Hostile values at the operator's own layers, each tested alone: validate() with the CRD bypassed, and the pod check.

The API server's layer is in tests/apiserver/test_admission.py, over the same tables.
"""

import pytest
from esper_leyline.reasons import RunReason
from esper_operator import build
from esper_operator.api import restricted
from esper_operator.api.v1alpha1 import FieldError, Spec
from esper_operator.api.validate import validate
from esper_operator.model import RunKey

from tests.support import hostile, specs
from tests.support.hostile import HostilePod, HostileSpec


@pytest.mark.parametrize("case", hostile.SPECS, ids=lambda case: case.name)
def test_the_operator_refuses_a_hostile_spec_on_its_own(case: HostileSpec) -> None:
    try:
        spec = Spec.parse(specs.with_patch(case.patch))
    except FieldError as error:
        messages = [f"{path}: {message}" for path, message in error.problems]
    else:
        messages = [str(problem) for problem in validate(spec, RunKey("team", "run"), specs.SETTINGS)]
    assert messages
    assert all(message.startswith("spec.") and len(message) < 1000 for message in messages)


def template(spec: dict[str, object] | None = None) -> dict[str, object]:
    found: dict[str, object] = build.job(specs.run(spec), 1, specs.SETTINGS)["spec"]["template"]
    return found


@pytest.mark.parametrize("case", hostile.PODS, ids=lambda case: case.name)
def test_the_pod_check_refuses_a_hostile_pod_on_its_own(case: HostilePod) -> None:
    problems = restricted.check(case.applied(template()))
    assert problems
    assert {problem.reason for problem in problems} == {RunReason.POD_NOT_RESTRICTED}
    assert all(problem.field.startswith("pod.") for problem in problems)


@pytest.mark.parametrize("case", hostile.HARMLESS, ids=lambda case: case.name)
def test_the_pod_check_lets_a_harmless_pod_through(case: HostilePod) -> None:
    assert restricted.check(case.applied(template())) == ()


def test_a_pod_without_anything_is_refused_and_not_a_crash() -> None:
    assert restricted.check({}) != ()
    assert restricted.check({"spec": {"containers": [{"name": "a"}]}}) != ()


def test_every_rule_of_the_pod_check_can_fail() -> None:
    pods = [case.applied(template()) for case in hostile.PODS]
    pods.append({"spec": {"containers": [{"name": "a", "securityContext": {"procMount": "Unmasked"}}]}})
    for rule in (*restricted.STANDARD, *restricted.NO_API_ACCESS):
        assert any(list(rule(pod)) for pod in pods), rule.__name__
