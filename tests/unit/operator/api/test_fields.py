"""Every field of the spec: taken when it fits, refused by name when it does not."""

import pytest
from esper_operator.api import crd
from esper_operator.api.v1alpha1 import FieldError, Spec, Status
from esper_operator.api.validate import validate
from pydantic import BaseModel

from tests.support import specs
from tests.support.fields import leaves, spoiled

SCHEMA = crd.manifest()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]


def _declared(schema: dict[str, object], path: str) -> set[str]:
    """Paths of all fields, list items as '[]', map values left out."""
    found: set[str] = set()
    for name, each in schema.get("properties", {}).items():  # type: ignore[attr-defined]
        found.add(f"{path}.{name}")
        found |= _declared(each, f"{path}.{name}")
        found |= _declared(each.get("items", {}), f"{path}.{name}[]")
    return found


def test_the_full_examples_set_every_field() -> None:
    shown: set[str] = set()
    for document in (specs.full(), specs.full_with_claim()):
        for path, *_ in leaves(SCHEMA, document, "spec"):
            shown.add("".join("[]" if part.isdigit() else part for part in path.replace("]", "[").split("[")))
    assert _declared(SCHEMA, "spec") - shown == set()


@pytest.mark.parametrize(
    "document", [specs.minimal(), specs.full(), specs.full_with_claim()], ids=["min", "full", "claim"]
)
def test_what_fits_is_taken_and_comes_back_the_same(document: dict[str, object]) -> None:
    spec = Spec.parse(document)
    assert Spec.parse(spec.to_dict()) == spec


def test_every_spoiled_field_is_refused_by_name() -> None:
    cases = [case for document in (specs.full(), specs.full_with_claim()) for case in spoiled(SCHEMA, document, "spec")]
    assert len(cases) > 400
    for case in cases:
        with pytest.raises(FieldError) as caught:
            Spec.parse(case.document)
        named = [path for path, _ in caught.value.problems]
        assert any(path.startswith(case.path) for path in named), (str(case), named)


def test_a_manifest_needs_only_entrypoint_and_storage() -> None:
    spec = Spec.parse(specs.minimal())
    assert validate(spec, specs.run().key, specs.SETTINGS) == ()
    assert spec.checkpoint.period_seconds == 60
    assert spec.workers.count == 1
    assert not spec.suspend


def test_a_missing_requirement_is_named() -> None:
    with pytest.raises(FieldError, match=r"spec\.runtime: is required"):
        Spec.parse({"checkpoint": {"storage": {"claimName": "a"}}})


def test_a_misspelt_field_brings_the_right_one() -> None:
    with pytest.raises(FieldError, match=r"spec\.runtime\.entrypont: unknown field \(did you mean 'entrypoint'\?\)"):
        Spec.parse(specs.with_patch({"runtime": {"entrypont": "a:b"}}))


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(FieldError) as caught:
        Spec.parse(specs.with_patch({"emergencyStop": "x" * 100_000}))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"workers": {"sharedMemorySize": "2 GB"}}, "must be a quantity such as 500m, 2 or 4Gi"),
        ({"runtime": {"entrypoint": "train"}}, "must name a function as 'package.module:function'"),
        ({"rollback": {"learningRateScale": "1.5"}}, "must be a decimal number from 0 to 1 in quotes"),
        ({"health": {"lossSpike": {"threshold": 3.0}}}, "must be a valid string"),
        ({"checkpoint": {"periodSeconds": 0}}, "is 0; must be at least 1"),
        ({"checkpoint": {"verification": "Full"}}, "must be one of 'None', 'Checksum' or 'Load'"),
        ({"workers": {"pod": {"volumes": {}}}}, "must be a list"),
    ],
)
def test_messages_say_what_would_be_right(patch: dict[str, object], words: str) -> None:
    with pytest.raises(FieldError) as caught:
        Spec.parse(specs.with_patch(patch))
    assert words in str(caught.value)


def test_free_form_config_keeps_its_nulls() -> None:
    spec = Spec.parse(specs.with_patch({"runtime": {"config": {"a": None, "b": [None]}}}))
    assert spec.to_dict()["runtime"]["config"] == {"a": None, "b": [None]}


def test_status_ignores_what_a_newer_version_wrote() -> None:
    status = Status.model_validate({"phase": "Running", "newThing": 1, "progress": {"step": 3, "newer": 2}})
    assert status.progress is not None
    assert status.progress.step == 3
    assert "newThing" not in status.to_dict()


def test_status_times_survive_the_round_trip() -> None:
    entry = {"time": "2026-01-02T03:04:05.678901Z", "from": "Running", "to": "RollingBack", "reason": "NonFiniteLoss"}
    status = Status.model_validate({"history": [entry]})
    assert status.to_dict()["history"] == [entry]


def test_a_changed_copy_is_checked_again() -> None:
    spec = Spec.parse(specs.minimal())
    assert spec.changed(suspend=True).suspend
    with pytest.raises(ValueError, match="valid boolean"):
        spec.changed(suspend="yes")


def test_every_field_has_a_description() -> None:
    def bare(model: type[BaseModel], seen: set[type[BaseModel]]) -> list[str]:
        if model in seen:
            return []
        seen.add(model)
        found = [f"{model.__name__}.{name}" for name, field in model.model_fields.items() if not field.description]
        for field in model.model_fields.values():
            for kind in _models(field.annotation):
                found += bare(kind, seen)
        return found

    assert bare(Spec, set()) + bare(Status, set()) == []


def _models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def test_a_null_counts_as_absent() -> None:
    assert Spec.parse(specs.with_patch({"restart": {}}) | {"workers": {"count": None}, "suspend": None}) == Spec.parse(
        specs.minimal()
    )
    with pytest.raises(FieldError, match=r"spec\.runtime\.entrypoint: is required"):
        Spec.parse({"runtime": {"entrypoint": None}, "checkpoint": specs.minimal()["checkpoint"]})
