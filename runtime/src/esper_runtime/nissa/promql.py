"""What an expression of PromQL reads: names of series, and the labels that it expects of them.

No parser: a scan that knows strings, selectors, groupings and functions. Enough to hold rules and panels against the
catalogue; Prometheus itself judges the rest.
"""

import re
from dataclasses import dataclass

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_RANGE = re.compile(r"\[[^\]]*\]")
_OFFSET = re.compile(r"\boffset\s+-?\w+")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"(?<![\w:$.])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\s*\(|[\w:])")
_MATCHER = re.compile(r"([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)")
_WORDS = frozenset({"and", "or", "unless", "bool", "by", "without", "on", "ignoring", "group_left", "group_right"})


@dataclass(frozen=True, slots=True)
class Selector:
    series: str
    labels: frozenset[str]
    """Names in its matchers."""


def selectors(expr: str) -> list[Selector]:
    """All series that the expression reads, as often as it does."""
    bare = _GROUPING.sub(" ", _OFFSET.sub(" ", _RANGE.sub(" ", _STRING.sub('""', expr))))
    return [
        Selector(name, frozenset(_MATCHER.findall(matchers or "")))
        for name, matchers in _SELECTOR.findall(bare)
        if name not in _WORDS
    ]


def groupings(expr: str) -> frozenset[str]:
    """Names of labels by which it groups or joins."""
    found = _GROUPING.findall(_STRING.sub('""', expr))
    return frozenset(label.strip() for group in found for label in group.split(",") if label.strip())
