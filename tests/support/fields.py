"""From a schema and a value that fits it: every way to spoil one field, each with the path of what was spoiled."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]
Put = Callable[[Any], Any]
"""Gives a copy of the whole document with this field replaced."""

_MISSING = object()


@dataclass(frozen=True)
class Spoiled:
    path: str
    how: str
    document: Any

    def __str__(self) -> str:
        return f"{self.path} {self.how}"


def leaves(schema: Schema, value: Any, path: str) -> Iterator[tuple[str, Schema, Any, Put]]:
    """Every field that `value` sets, the objects and lists among them too, with a way to replace it."""
    yield from _walk(schema, value, path, lambda new: new)


def _walk(schema: Schema, value: Any, path: str, put: Put) -> Iterator[tuple[str, Schema, Any, Put]]:
    yield path, schema, value, put
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties", {})
            yield from _walk(inner, item, f"{path}.{key}", _into(put, value, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(schema["items"], item, f"{path}[{index}]", _into(put, value, index))


def _into(put: Put, container: Any, key: Any) -> Put:
    def inner(new: Any) -> Any:
        changed = copy.deepcopy(container)
        if new is _MISSING:
            del changed[key]
        else:
            changed[key] = new
        return put(changed)

    return inner


def spoiled(schema: Schema, value: Any, path: str) -> Iterator[Spoiled]:
    """Every document that differs from `value` in one field that does not fit `schema`."""
    for where, each, item, put in leaves(schema, value, path):
        for how, bad in _bad_values(each, item):
            yield Spoiled(where, how, put(bad))
        for name in each.get("required", ()) if isinstance(item, dict) else ():
            without = {key: part for key, part in item.items() if key != name}
            yield Spoiled(f"{where}.{name}", "missing", put(without))


def _bad_values(schema: Schema, item: Any) -> Iterator[tuple[str, Any]]:
    if schema.get("x-kubernetes-int-or-string"):
        yield "neither integer nor text", {"a": 1}
        yield "a fraction", 1.5
        yield "other text", "1 Gigabyte"
        yield "too long", "1" * (schema["maxLength"] + 1)
    elif schema["type"] == "string":
        yield "a number", 7
        if "enum" in schema:
            yield "none of the choices", "Nonsense"
        elif "maxLength" in schema:
            yield "too long", "a" * (schema["maxLength"] + 1)
        if schema.get("minLength"):
            yield "empty", ""
        if "pattern" in schema:
            yield "against the pattern", "! not this !"
    elif schema["type"] == "integer":
        yield "text", str(item)
        yield "a fraction", 1.5
        yield "too small", schema["minimum"] - 1
        if "maximum" in schema:
            yield "too great", schema["maximum"] + 1
    elif schema["type"] == "boolean":
        yield "text", "true"
    elif schema["type"] == "array":
        yield "a mapping", {"a": 1}
        if schema.get("minItems"):
            yield "empty", []
        yield "too long", [item[0]] * (schema["maxItems"] + 1)
    else:
        yield from _bad_objects(schema, item)


def _bad_objects(schema: Schema, item: Any) -> Iterator[tuple[str, Any]]:
    yield "text", "a"
    yield "a list", []
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if "properties" in schema:
        yield "with an unknown field", {**item, "unknownField": 1}
    else:
        first = next(iter(item.values()))
        yield "too many keys", {f"k{n}": first for n in range(schema["maxProperties"] + 1)}
