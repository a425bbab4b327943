"""The CustomResourceDefinition, made from the models: a structural schema in the subset that the API server takes.

`manifest()` is what `crds/` and the chart hold; `reference()` is docs/reference/crd.md. Both are pure.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from esper_leyline.labels import GROUP, KIND, PLURAL, SHORT_NAMES, SINGULAR, VERSION

from esper_operator.api.base import Model
from esper_operator.api.v1alpha1 import Spec, Status

Schema = dict[str, Any]

MAX_NAME = 46
"""So that '<name>-a<attempt>-<rank>' stays a DNS label."""
NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_RULES = (
    (
        f"size(self.metadata.name) <= {MAX_NAME}",
        f"metadata.name must be at most {MAX_NAME} characters so that '<name>-a<attempt>-<rank>' stays a DNS label",
    ),
    (
        f"self.metadata.name.matches('{NAME_PATTERN}')",
        "metadata.name must be an RFC 1035 label: small letters, digits and '-', a letter first",
    ),
)
_INT32_MAX = 2**31 - 1
_DROPPED = frozenset({"title", "$defs"})


def manifest() -> dict[str, Any]:
    """The CustomResourceDefinition, ready to be applied."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": list(SHORT_NAMES),
                "categories": ["esper"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "selectableFields": [
                        {"jsonPath": ".status.phase"},
                        {"jsonPath": ".spec.scheduling.queueName"},
                    ],
                    "additionalPrinterColumns": _columns(),
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def _columns() -> list[dict[str, Any]]:
    def column(name: str, kind: str, path: str, description: str, priority: int = 0) -> dict[str, Any]:
        found = {"name": name, "type": kind, "jsonPath": path, "description": description}
        return {**found, "priority": priority} if priority else found

    return [
        column("Phase", "string", ".status.phase", "What the run is doing"),
        column("Epoch", "integer", ".status.progress.epoch", "Epoch in progress"),
        column("Step", "integer", ".status.progress.step", "Optimizer steps done"),
        column("Progress", "integer", ".status.progress.percentage", "Percent complete"),
        column("Attempt", "integer", ".status.attempt", "Number of the child Job"),
        column("Rollbacks", "integer", ".status.rollbacks.total", "Rollbacks so far"),
        column("Ready", "string", ".status.ranks.summary", "Ready pods of those wanted"),
        column("Age", "date", ".metadata.creationTimestamp", "Time since creation"),
        column("Loss", "string", ".status.progress.loss", "Last training loss", 1),
        column("Checkpoint", "integer", ".status.checkpoint.latestVerifiedStep", "Step of the newest checkpoint", 1),
        column("Restarts", "integer", ".status.restarts.total", "New attempts because of failures", 1),
        column("Reason", "string", ".status.reason", "Why this phase", 1),
        column("Queue", "string", ".spec.scheduling.queueName", "Kueue's LocalQueue", 1),
    ]


def _root() -> Schema:
    return {
        "type": "object",
        "description": "EsperTrainingRun runs one fault-tolerant morphogenetic PyTorch training.",
        "required": ["spec"],
        "x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in NAME_RULES],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(Spec, defaults=True),
            "status": structural(Status, defaults=False),
        },
    }


def structural(model: type[Model], *, defaults: bool) -> Schema:
    """The structural schema of `model`; without `defaults` the API server fills nothing in."""
    raw = model.model_json_schema(by_alias=True)
    return _Converter(raw.get("$defs", {}), defaults).convert(raw)


class _Converter:
    """Turns pydantic's JSON schema into a structural one: no references, no unions with null, no closed objects
    (the API server prunes or refuses unknown fields by itself), integers with a format."""

    def __init__(self, definitions: Mapping[str, Schema], defaults: bool) -> None:
        self._definitions = definitions
        self._defaults = defaults

    def convert(self, raw: Schema) -> Schema:
        flat = self._flatten(raw)
        out: Schema = {}
        for key, value in flat.items():
            if key == "properties":
                required = flat.get("required", ())
                out[key] = {name: self._property(each, name in required) for name, each in value.items()}
            elif key == "items" or (key == "additionalProperties" and isinstance(value, dict)):
                out[key] = self.convert(value)
            elif key == "description":
                out[key] = " ".join(value.split())
            elif key == "default":
                if self._defaults and value not in (None, []):
                    out[key] = value
            elif key not in _DROPPED and key != "additionalProperties":
                out[key] = value
        if out.get("type") == "integer":
            out["format"] = "int32" if out.get("maximum", _INT32_MAX + 1) <= _INT32_MAX else "int64"
        return out

    def _flatten(self, raw: Schema) -> Schema:
        """`raw` with its reference or its optional union replaced by what it stands for; own keys win."""
        if "$ref" in raw:
            target = self._definitions[raw["$ref"].rsplit("/", 1)[1]]
            return {**self._flatten(target), **{k: v for k, v in raw.items() if k != "$ref"}}
        if "anyOf" in raw:
            (target,) = [each for each in raw["anyOf"] if each.get("type") != "null"]
            return {**self._flatten(target), **{k: v for k, v in raw.items() if k != "anyOf"}}
        return raw

    def _property(self, raw: Schema, required: bool) -> Schema:
        found = self.convert(raw)
        fills = "$ref" in raw and not required and "required" not in found
        if self._defaults and fills and _has_defaults(found):
            found["default"] = {}  # so that the defaults inside are filled in too
        return found


def _has_defaults(schema: Schema) -> bool:
    return any("default" in each or _has_defaults(each) for each in schema.get("properties", {}).values())


def reference() -> str:
    """docs/reference/crd.md: every field with type, default and meaning."""
    root = _root()["properties"]
    lines = [
        f"# {KIND} ({GROUP}/{VERSION})",
        "",
        "Generated by `scripts/generate` from `esper_operator.api`; `kubectl explain esperrun.spec` says the same.",
    ]
    for part in ("spec", "status"):
        lines += ["", f"## {part}", "", "| Field | Type | Default | Meaning |", "|---|---|---|---|"]
        lines += [_row(path, each, required) for path, each, required in _fields(root[part], part)]
    lines += ["", "## Rules", "", "Checked by the API server, and again by the operator.", ""]
    lines += [f"* `{path}`: {rule['message']}" for path, rule in cel_rules(_root())]
    return "\n".join(lines) + "\n"


def _fields(schema: Schema, path: str) -> Iterator[tuple[str, Schema, bool]]:
    for name, each in schema.get("properties", {}).items():
        here = f"{path}.{name}"
        yield here, each, name in schema.get("required", ())
        yield from _fields(each, here)
        yield from _fields(each.get("items", {}), here + "[]")


def _row(path: str, schema: Schema, required: bool) -> str:
    default = schema.get("default")
    shown = "**required**" if required else "" if default in (None, {}) else f"`{_plain(default)}`"
    text = schema.get("description", "").replace("|", "\\|")
    return f"| `{path}` | {_type(schema)} | {shown} | {text} |"


def _type(schema: Schema) -> str:
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity" if "pattern" in schema else "integer or string"
    if "enum" in schema:
        return ", ".join(schema["enum"])
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"map of {_type(schema['additionalProperties'])}"
    low, high = schema.get("minimum"), schema.get("maximum")
    bounds = f" {low}…{high}" if None not in (low, high) else f" ≥ {low}" if low is not None else ""
    kind = "time" if schema.get("format") == "date-time" else schema.get("type", "object")
    return f"{kind}{bounds}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def cel_rules(schema: Schema, path: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """Every rule in `schema` with the path of the field that it stands at."""
    for rule in schema.get("x-kubernetes-validations", ()):
        yield path or "metadata.name", rule
    for name, each in schema.get("properties", {}).items():
        yield from cel_rules(each, f"{path}.{name}" if path else name)
    if "items" in schema:
        yield from cel_rules(schema["items"], path + "[]")
