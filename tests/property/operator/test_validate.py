"""Whatever a spec holds: it is refused with words, or it builds a pod that the cluster admits."""

import copy
from fractions import Fraction
from typing import Any

import jsonschema
import pytest
from esper_operator import build
from esper_operator.api import crd, quantity, restricted
from esper_operator.api.base import QUANTITY_LENGTH
from esper_operator.api.v1alpha1 import FieldError, Spec
from esper_operator.api.validate import validate
from esper_operator.model import RunKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import specs
from tests.support.fields import leaves

SCHEMA = crd.manifest()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
DOCUMENTS = (specs.minimal(), specs.full(), specs.full_with_claim(), specs.buildable())
PLACES = [leaf for document in DOCUMENTS for leaf in leaves(SCHEMA, document, "spec")]
KEY = RunKey("team", "run")
RELAXED = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["..", "/", "/data", "/data/../etc", "a/../b", "1Gi", "-1", "0", "1e99", "auto", "None", "Kill", "ESPER_RUN",
         "RANK", "run-keys", "esper.dev/run", "a" * 300, "0.0", "nvidia.com/gpu"]
    ),
)  # fmt: skip


def _values(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaf,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
        max_leaves=5,
    )


NOT_NULL = st.one_of(st.booleans(), st.integers(), st.floats(), TEXTS)
VALUES = _values(st.one_of(st.none(), NOT_NULL))


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The structural schema as plain JSON schema: what the API server adds by itself is spelled out."""
    found = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes") and key != "default"}
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if "properties" in schema:
        found["properties"] = {name: closed(each) for name, each in schema["properties"].items()}
        found["additionalProperties"] = False
    for part in ("items", "additionalProperties"):
        if isinstance(schema.get(part), dict):
            found[part] = closed(schema[part])
    return found


CHECKER = jsonschema.Draft202012Validator(closed(SCHEMA))


@RELAXED
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_anywhere_is_refused_with_words_or_builds_an_admissible_pod(place: Any, value: Any) -> None:
    _, _, _, put = place
    try:
        spec = Spec.parse(put(value))
    except FieldError as error:
        _says_what_is_wrong(error)
        return
    problems = validate(spec, KEY, specs.SETTINGS)
    assert all(problem.field and problem.message for problem in problems)
    if problems:
        return
    run = specs.run(spec.to_dict())
    manifest = build.job(run, 1, specs.SETTINGS)
    assert restricted.check(manifest["spec"]["template"]) == ()
    assert manifest == build.job(run, 1, specs.SETTINGS)
    build.children(run, specs.SETTINGS)


@RELAXED
@given(place=st.sampled_from(PLACES), value=_values(NOT_NULL))
def test_the_models_and_the_schema_agree(place: Any, value: Any) -> None:
    """What the API server takes by the schema, the operator can read, and the other way round."""
    path, schema, _, put = place
    if schema.get("x-kubernetes-int-or-string") and "pattern" not in schema:
        return  # processesPerWorker is bounded by a rule, not by the schema
    document = put(value)
    try:
        Spec.parse(document)
        read = True
    except FieldError:
        read = False
    assert read == (CHECKER.is_valid(document) and not _has_whole_floats(document)), path


def _has_whole_floats(value: Any) -> bool:
    """JSON schema counts 1.0 as an integer; we do not."""
    if isinstance(value, dict):
        return any(_has_whole_floats(each) for key, each in value.items() if key != "config")
    if isinstance(value, list):
        return any(map(_has_whole_floats, value))
    return isinstance(value, float) and value.is_integer()


@RELAXED
@given(value=VALUES)
def test_no_document_at_all_is_a_crash(value: Any) -> None:
    try:
        Spec.parse(value)
    except FieldError as error:
        _says_what_is_wrong(error)


def _says_what_is_wrong(error: FieldError) -> None:
    assert error.problems
    assert all(path.startswith("spec") and message for path, message in error.problems)


@settings(RELAXED, max_examples=30)
@given(items=st.permutations(list(specs.buildable().items())))
def test_order_of_keys_does_not_matter(items: list[tuple[str, Any]]) -> None:
    document, shuffled = specs.buildable(), dict(items)
    assert build.job(specs.run(shuffled), 1, specs.SETTINGS) == build.job(specs.run(document), 1, specs.SETTINGS)


@given(number=st.integers(0, 10**9), suffix=st.sampled_from(["", "m", "k", "M", "G", "Ki", "Mi", "Gi", "Ti"]))
def test_quantities_are_exact(number: int, suffix: str) -> None:
    unit = quantity.parse(f"1{suffix}")
    assert quantity.parse(f"{number}{suffix}") == number * unit
    assert quantity.parse(f"-{number}{suffix}") == -number * unit


@given(size=st.integers(1, 2**62))
def test_sizes_come_back(size: int) -> None:
    assert quantity.parse(quantity.binary(quantity.parse(str(size)))) == size


@given(text=st.text(max_size=QUANTITY_LENGTH))
def test_what_is_no_quantity_says_so(text: str) -> None:
    message = ""
    try:
        quantity.parse(text)
    except ValueError as error:
        message = str(error)
    assert not message or "quantity" in message or "exponent" in message


@pytest.mark.parametrize(
    ("text", "number"), [("500m", "1/2"), (".5", "1/2"), ("1e3", "1000"), ("2Ki", "2048"), ("1E", 10**18)]
)
def test_known_quantities(text: str, number: str | int) -> None:
    assert quantity.parse(text) == Fraction(number)


def test_mutating_a_returned_manifest_changes_no_later_one() -> None:
    run = specs.run(specs.buildable())
    before = copy.deepcopy(build.job(run, 1, specs.SETTINGS))
    build.job(run, 1, specs.SETTINGS)["spec"]["template"]["spec"]["initContainers"][0]["resources"]["limits"].clear()
    assert build.job(run, 1, specs.SETTINGS) == before
