"""The shipped rules with another clock: every duration in them is divided by one factor, and nothing else is changed.

So a rule that waits for two minutes waits for four seconds, and one that looks back over five looks back over ten
seconds: the same samples in proportion, sooner. Thresholds stay, those in seconds too.
"""

import re
from pathlib import Path
from typing import Any, Final

import yaml

FACTOR: Final = 30
EVERY_S: Final = 1.0
"""Prometheus scrapes and evaluates that often."""
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_RANGE: Final = re.compile(r"\[(\d+[smhd])(?::(\d+[smhd]))?\]")
_OFFSET: Final = re.compile(r"\boffset (\d+[smhd])")


def shortened(duration: str, factor: float = FACTOR) -> str:
    """2m by 30 is 4000ms."""
    milliseconds = int(duration[:-1]) * _UNITS[duration[-1]] * 1000 / factor
    return f"{round(milliseconds)}ms" if milliseconds else "0s"


def quickened(text: str, factor: float = FACTOR) -> str:
    """A file of rules."""
    document = yaml.safe_load(text)
    for group in document["groups"]:
        group["interval"] = f"{EVERY_S:g}s"
        for rule in group["rules"]:
            _quicken(rule, factor)
    return yaml.safe_dump(document, sort_keys=False, width=1000)


def _quicken(rule: dict[str, Any], factor: float) -> None:
    if "for" in rule:
        rule["for"] = shortened(rule["for"], factor)

    def window(found: "re.Match[str]") -> str:
        parts = [shortened(part, factor) for part in found.groups() if part]
        return f"[{':'.join(parts)}]"

    expr = _RANGE.sub(window, rule["expr"])
    rule["expr"] = _OFFSET.sub(lambda found: f"offset {shortened(found[1], factor)}", expr)


def write(source: Path, directory: Path, factor: float = FACTOR) -> list[Path]:
    """All rules of `source`, quickened, in `directory`."""
    written = []
    for path in sorted(source.glob("*.yaml")):
        written.append(directory / path.name)
        written[-1].write_text(quickened(path.read_text(), factor))
    return written
