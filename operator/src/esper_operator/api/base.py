"""What the models of the resource are made of: the base class, bounded field types, readable errors.

A field's docstring becomes its description in the CRD. Bounds are what the API server checks as well; everything
that spans fields is in `esper_operator.api.validate`.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, StringConstraints, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo
from pydantic.json_schema import WithJsonSchema
from pydantic_core import ErrorDetails

QUANTITY_PATTERN = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
"""Kubernetes' own, so that kubectl users meet no second notation."""
QUANTITY_LENGTH = 32
SUBDOMAIN_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
QUALIFIED_PATTERN = (
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
)
LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
ENTRYPOINT_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$"
MOUNT_PATH_PATTERN = r"^(/[^/:]+)+$"
DECIMAL_PATTERN = r"^[0-9]+(\.[0-9]+)?$"
FACTOR_PATTERN = r"^(0(\.[0-9]+)?|1(\.0+)?)$"
ENV_PATTERN = r"^[A-Za-z_][-A-Za-z0-9_.]*$"


def _quantity_text(value: Any) -> Any:
    """An integer is a quantity too; inside it is always text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Integer = Annotated[int, Strict()]
Boolean = Annotated[bool, Strict()]
Quantity = Annotated[
    str,
    BeforeValidator(_quantity_text),
    StringConstraints(pattern=QUANTITY_PATTERN, max_length=QUANTITY_LENGTH),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": QUANTITY_PATTERN, "maxLength": QUANTITY_LENGTH}),
]
ObjectName = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=SUBDOMAIN_PATTERN)]
"""Name of a Kubernetes object: an RFC 1123 subdomain."""
LabelValue = Annotated[str, StringConstraints(max_length=63, pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")]
QualifiedName = Annotated[str, StringConstraints(min_length=1, max_length=316, pattern=QUALIFIED_PATTERN)]
"""Key of a label or taint, with or without a prefix."""


_PATTERN_WORDS = {
    QUANTITY_PATTERN: "must be a quantity such as 500m, 2 or 4Gi",
    SUBDOMAIN_PATTERN: "must be a name of small letters, digits, '-' and '.'",
    LABEL_PATTERN: "must be a name of small letters, digits and '-'",
    QUALIFIED_PATTERN: "must be name or prefix/name of letters, digits, '-', '_' and '.'",
    ENTRYPOINT_PATTERN: "must name a function as 'package.module:function'",
    MOUNT_PATH_PATTERN: "must be an absolute path without ':', empty parts or a '/' at the end",
    DECIMAL_PATTERN: 'must be a decimal number in quotes, such as "3.0"',
    FACTOR_PATTERN: 'must be a decimal number from 0 to 1 in quotes, such as "0.5"',
    ENV_PATTERN: "must be a name of letters, digits, '_', '-' and '.', and not begin with a digit",
}
"""What a pattern means, for people."""
M = TypeVar("M", bound=BaseModel)


class FieldError(ValueError):
    """A value of the resource that has no valid shape. `problems` are (path, message with the remedy)."""

    def __init__(self, problems: tuple[tuple[str, str], ...]) -> None:
        super().__init__("; ".join(f"{path}: {message}" for path, message in problems))
        self.problems = problems


class Model(BaseModel):
    """snake_case inside, camelCase outside, frozen, closed."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, raw: Any) -> Any:
        """A field that is null counts as absent, as it does for the API server."""
        if not isinstance(raw, Mapping):
            return raw
        known = {field.alias for field in cls.model_fields.values()} | set(cls.model_fields)
        return {key: value for key, value in raw.items() if value is not None or key not in known}

    def to_dict(self) -> dict[str, Any]:
        """camelCase, JSON types only, no nulls."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def changed(self, **updates: Any) -> Self:
        """A copy with some fields replaced; names and types are checked again."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**values, **updates}, by_name=True)


def parse(model: type[M], raw: Any, root: str) -> M:
    """`raw` as a model; FieldError names each bad field below `root` with its remedy."""
    try:
        return model.model_validate(raw, by_alias=True, by_name=False)
    except ValidationError as error:
        problems = tuple((_path(root, e["loc"]), _message(model, e)) for e in error.errors(include_url=False))
        raise FieldError(problems) from error


def _path(root: str, location: Iterable[int | str]) -> str:
    path = root
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path


def _message(model: type[BaseModel], error: ErrorDetails) -> str:
    """What is wrong and what would be right, in the resource's words."""
    shown = _shown(error["input"])
    context = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "is required: add it"
        case "extra_forbidden":
            return "unknown field" + _suggestion(model, error["loc"]) + ": remove it or correct its name"
        case "literal_error" | "enum":
            return f"is {shown}; must be one of {context['expected']}"
        case "string_pattern_mismatch":
            return f"is {shown}; {_PATTERN_WORDS.get(context['pattern'], 'must match ' + context['pattern'])}"
        case "string_too_long":
            return f"is longer than {context['max_length']} characters: shorten it"
        case "string_too_short":
            return f"is {shown}; needs at least {context['min_length']} character(s)"
        case "greater_than_equal":
            return f"is {shown}; must be at least {context['ge']}"
        case "less_than_equal":
            return f"is {shown}; must be at most {context['le']}"
        case "too_long":
            return f"has {context['actual_length'] or 'too many'} entries; at most {context['max_length']} are allowed"
        case "too_short":
            return f"needs at least {context['min_length']} entry(s)"
        case "value_error":
            return f"is {shown}; {context['error']}"
        case "model_type" | "dict_type" | "mapping_type":
            return f"is {shown}; must be a mapping"
        case "tuple_type":
            return f"is {shown}; must be a list"
    return f"is {shown}; {error['msg'].replace('Input should be', 'must be')}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."


def _suggestion(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    known: list[str] = []
    at: type[BaseModel] | None = model
    for part in location[:-1]:
        if isinstance(part, str) and at is not None:
            at = _model_of(at, part)
    if at is not None:
        known = [field.alias or name for name, field in at.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _model_of(model: type[BaseModel], alias: str) -> type[BaseModel] | None:
    field = next((f for name, f in model.model_fields.items() if alias in (name, f.alias)), None)
    return None if field is None else _find_model(field)


def _find_model(field: FieldInfo) -> type[BaseModel] | None:
    pending = [field.annotation]
    while pending:
        kind: Any = pending.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        pending.extend(getattr(kind, "__args__", ()))
    return None


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules of a field as (rule, message)."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


def ruled(*pairs: tuple[str, str]) -> ConfigDict:
    """Configuration of a model with CEL rules."""
    return ConfigDict(json_schema_extra=rules(*pairs))


def listing(kind: str, *keys: str) -> dict[str, Any]:
    """How server-side apply merges a list: atomic, set, or map by `keys`."""
    found: dict[str, Any] = {"x-kubernetes-list-type": kind}
    if keys:
        found["x-kubernetes-list-map-keys"] = list(keys)
    return found
