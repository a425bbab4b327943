"""The CRD as a document: structural, bounded, described, small, and current."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from esper_operator.api import crd

from tests.support import specs

ROOT = Path(__file__).resolve().parents[4]
MANIFEST = crd.manifest()
VERSION = MANIFEST["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
MAX_BYTES = 60 * 1024


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, each in schema.get("properties", {}).items():
        yield from nodes(each, f"{path}.{name}")
    for part in ("items", "additionalProperties"):
        if part in schema:
            yield from nodes(schema[part], f"{path}[]")


OWN = [(path, node) for path, node in nodes(SCHEMA) if path.startswith((".spec", ".status"))]


def test_it_fits_into_60_kb() -> None:
    size = len(json.dumps(MANIFEST, separators=(",", ":")).encode())
    print(f"CRD: {size} bytes of JSON, {len(OWN)} fields")
    assert size <= MAX_BYTES


def test_every_field_is_described() -> None:
    assert [p for p, node in OWN if not node.get("description") and not p.endswith("[]")] == []


def test_every_string_is_bounded() -> None:
    def bounded(node: dict[str, Any]) -> bool:
        return "maxLength" in node or "enum" in node or node.get("format") == "date-time"

    strings = [(p, n) for p, n in OWN if n.get("type") == "string" or n.get("x-kubernetes-int-or-string")]
    assert [p for p, node in strings if not bounded(node)] == []


def test_every_list_and_map_is_bounded_and_typed() -> None:
    lists = [(p, n) for p, n in OWN if n.get("type") == "array"]
    assert [p for p, n in lists if "maxItems" not in n or "x-kubernetes-list-type" not in n] == []
    assert [p for p, n in OWN if "additionalProperties" in n and "maxProperties" not in n] == []


def test_every_integer_has_a_format() -> None:
    integers = [(p, n) for p, n in OWN if n.get("type") == "integer"]
    assert [p for p, n in integers if n.get("format") not in ("int32", "int64")] == []


def test_only_runtime_config_is_free_form() -> None:
    assert [p for p, n in OWN if n.get("x-kubernetes-preserve-unknown-fields")] == [".spec.runtime.config"]


def test_the_status_has_no_defaults() -> None:
    assert [p for p, node in OWN if p.startswith(".status") and "default" in node] == []


def test_every_rule_has_a_case() -> None:
    rules = {(path, rule["message"]) for path, rule in crd.cel_rules(SCHEMA)}
    for case in specs.RULES:
        matching = {
            (path, message) for path, message in rules if path == case.path and message.startswith(case.message)
        }
        assert len(matching) == 1, case.id
        rules -= matching
    assert rules == set()


def test_columns_point_at_fields() -> None:
    paths = {path for path, _ in nodes(SCHEMA)} | {".metadata.creationTimestamp"}
    shown = [column["jsonPath"] for column in VERSION["additionalPrinterColumns"]]
    selectable = [each["jsonPath"] for each in VERSION["selectableFields"]]
    assert [p for p in shown + selectable if p not in paths] == []


@pytest.mark.parametrize("path", ["crds/espertrainingruns.yaml", "charts/esper/templates/crd.yaml"])
def test_the_committed_file_is_current(path: str) -> None:
    text = (ROOT / path).read_text()
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("{{"))
    found = yaml.safe_load(plain)
    annotations = found["metadata"].pop("annotations", {})
    assert found == MANIFEST, "run scripts/generate"
    assert annotations in ({}, {"helm.sh/resource-policy": "keep"})


def test_the_reference_page_is_current() -> None:
    assert (ROOT / "docs/reference/crd.md").read_text() == crd.reference(), "run scripts/generate"
