"""Tolerant reading of JSON: a field that is missing or of the wrong type reads as its default."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_INTEGER = 2**63 - 1
_NOTHING: Mapping[str, Any] = {}


def at(raw: Any, *path: str) -> Any:
    """The value below `path`, or None where the path ends early."""
    for key in path:
        if not isinstance(raw, Mapping):
            return None
        raw = raw.get(key)
    return raw


def section(raw: Any, *path: str) -> Mapping[str, Any]:
    found = at(raw, *path)
    return found if isinstance(found, Mapping) else _NOTHING


def text(raw: Any, *path: str) -> str:
    found = at(raw, *path)
    return found if isinstance(found, str) else ""


def flag(raw: Any, *path: str) -> bool:
    return at(raw, *path) is True


def integer(raw: Any, *path: str, default: int = 0) -> int:
    found = at(raw, *path)
    usable = isinstance(found, int) and not isinstance(found, bool) and abs(found) <= MAX_INTEGER
    return found if usable else default


def digits(value: str) -> int | None:
    """A decimal number as labels carry it; None for anything else."""
    return int(value) if value.isascii() and value.isdigit() and len(value) <= 9 else None


def objects(raw: Any, *path: str) -> Iterator[Mapping[str, Any]]:
    """The objects of a list; everything else in it is skipped."""
    found = at(raw, *path)
    if isinstance(found, list):
        yield from (entry for entry in found if isinstance(entry, Mapping))


def strings(raw: Any, *path: str) -> dict[str, str]:
    """A map of strings, such as labels."""
    return {k: v for k, v in section(raw, *path).items() if isinstance(k, str) and isinstance(v, str)}


def moment(raw: Any, *path: str) -> datetime | None:
    """An RFC 3339 time; one without a zone is taken as UTC."""
    found = text(raw, *path)
    try:
        time = datetime.fromisoformat(found)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def conditions(raw: Any) -> dict[str, Mapping[str, Any]]:
    """status.conditions by type."""
    return {text(c, "type"): c for c in objects(raw, "status", "conditions")}


def controller(raw: Any) -> Mapping[str, Any]:
    """The controlling owner reference; empty when there is none."""
    owners = objects(raw, "metadata", "ownerReferences")
    return next((o for o in owners if o.get("controller") is True), _NOTHING)
