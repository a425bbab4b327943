"""Label selectors as Kubernetes writes them: matchLabels and matchExpressions, or the text that kubectl -l takes."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_TERM = 2048
_KEY = r"(?:[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
_VALUE = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
_EQUALITY = re.compile(rf"({_KEY})\s*(==|=|!=)\s*({_VALUE})")
_SET = re.compile(rf"({_KEY})\s+(in|notin)\s*\(([^()]*)\)")
_EXISTS = re.compile(rf"(!?)\s*({_KEY})")
_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


Term = tuple[str, str, tuple[str, ...]]
"""Label, operator, values."""


def matches(selector: Any, labels: Mapping[str, str]) -> bool:
    """Whether `selector` selects `labels`. ValueError says what is wrong with it. {} selects everything."""
    return holds(parse(selector), labels)


def parse(selector: Any) -> tuple[Term, ...]:
    """All of them must hold. ValueError says what is wrong."""
    if isinstance(selector, str):
        return tuple(_term(part.strip()) for part in _parts(selector))
    if isinstance(selector, Mapping):
        return tuple(_structured(selector))
    raise ValueError("selector must be a mapping with matchLabels and matchExpressions, or text such as 'team=vision'")


def holds(terms: Iterable[Term], labels: Mapping[str, str]) -> bool:
    return all(_holds(labels, *term) for term in terms)


def _parts(text: str) -> Iterator[str]:
    """Between commas that are in no parentheses."""
    start, inside = 0, False
    for at, character in enumerate(text):
        if character in "()":
            inside = character == "("
        elif character == "," and not inside:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def _structured(selector: Mapping[Any, Any]) -> list[Term]:
    unknown = [str(key) for key in selector if key not in ("matchLabels", "matchExpressions")]
    if unknown:
        raise ValueError(f"selector has the unknown key '{unknown[0]}'; known are matchLabels and matchExpressions")
    exact = selector.get("matchLabels") or {}
    if not isinstance(exact, Mapping) or not all(isinstance(v, str) for pair in exact.items() for v in pair):
        raise ValueError("selector.matchLabels must map label names to values")
    expressions = selector.get("matchExpressions") or []
    if not isinstance(expressions, list):
        raise ValueError("selector.matchExpressions must be a list")
    return [(key, "In", (value,)) for key, value in exact.items()] + [_expression(e) for e in expressions]


def _expression(raw: Any) -> tuple[str, str, tuple[str, ...]]:
    if not isinstance(raw, Mapping):
        raise ValueError("an entry of selector.matchExpressions must have key, operator and values")
    key, operator, values = raw.get("key"), raw.get("operator"), raw.get("values") or []
    if not isinstance(key, str) or operator not in _OPERATORS:
        raise ValueError(
            f"an entry of selector.matchExpressions needs key and one of the operators {', '.join(_OPERATORS)}"
        )
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError("values of a selector's matchExpressions must be a list of text")
    if bool(values) != (operator in ("In", "NotIn")):
        raise ValueError(f"operator {operator} of selector.matchExpressions and its values do not go together")
    return key, operator, tuple(values)


def _term(text: str) -> tuple[str, str, tuple[str, ...]]:
    if len(text) > MAX_TERM:
        raise ValueError(f"selector has a part of {len(text)} characters; at most {MAX_TERM} are allowed")
    if found := _EQUALITY.fullmatch(text):
        key, sign, value = found.groups()
        return key, "NotIn" if sign == "!=" else "In", (value,)
    if found := _SET.fullmatch(text):
        key, word, values = found.groups()
        return key, "In" if word == "in" else "NotIn", tuple(v.strip() for v in values.split(","))
    if found := _EXISTS.fullmatch(text):
        absent, key = found.groups()
        return key, "DoesNotExist" if absent else "Exists", ()
    raise ValueError(
        f"selector has the part '{text[:64]}'; write name=value, name!=value, name in (a, b), name or !name"
    )


def _holds(labels: Mapping[str, str], key: str, operator: str, values: tuple[str, ...]) -> bool:
    present = key in labels
    match operator:
        case "In":
            return present and labels[key] in values
        case "NotIn":
            return not (present and labels[key] in values)
        case "Exists":
            return present
    return not present
