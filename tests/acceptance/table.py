"""Makes the table of acceptance rows out of what the plugin recorded: for the terminal and docs/acceptance.md.

    python -m tests.acceptance.table RESULTS [--write docs/acceptance.md] [--prefix T]

Exit code 1 when a row that is not listed as later work failed or has no test that ran.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.acceptance.rows import ROWS, Row

MAX_SHOWN = 6


@dataclass(slots=True)
class Shown:
    """What became of the tests of one row, by function; parametrized cases count together."""

    outcomes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    reasons: set[str] = field(default_factory=set)

    def add(self, test: str, outcome: str, why: str) -> None:
        self.outcomes[test.partition("[")[0]].append(outcome)
        if why:
            self.reasons.add(why.removeprefix("Skipped: "))

    def count(self, outcome: str) -> int:
        return sum(found.count(outcome) for found in self.outcomes.values())

    @property
    def verdict(self) -> str:
        if self.count("failed"):
            return "failed"
        if self.count("passed"):
            return "passed"
        return "not run here" if self.outcomes else "no test"


def collect(lines: Iterable[str]) -> dict[str, Shown]:
    found: dict[str, Shown] = defaultdict(Shown)
    for line in lines:
        entry = json.loads(line)
        for row in entry["rows"]:
            found[row].add(entry["test"], entry["outcome"], entry["why"])
    return found


def missing(rows: Sequence[Row], found: dict[str, Shown]) -> list[Row]:
    """Rows that are due and not shown."""
    return [row for row in rows if not row.later and found.get(row.id, Shown()).verdict != "passed"]


def terminal(rows: Sequence[Row], found: dict[str, Shown]) -> str:
    lines = []
    for row in rows:
        shown = found.get(row.id, Shown())
        verdict = shown.verdict if shown.outcomes or not row.later else "later"
        lines.append(f"{row.id}  {verdict:12} {shown.count('passed'):4} passed  {row.promise}")
        lines += [f"       {test}" for test in list(shown.outcomes)[:MAX_SHOWN]]
        lines += [f"       not run here: {reason}" for reason in sorted(shown.reasons)]
        if row.later:
            lines.append(f"       later: {row.later}")
    return "\n".join(lines)


def page(rows: Sequence[Row], found: dict[str, Shown]) -> str:
    """Markdown. Holds nothing that differs from one run to the next on a machine that can run the same tests."""
    lines = [
        "# Acceptance",
        "",
        "Written by `make acceptance`; do not edit. A row counts when a test that can fail has run and passed.",
        "Rows that say “later” wait for the part that is named.",
        "",
        "| Row | Promise | Result | Shown by |",
        "|---|---|---|---|",
    ]
    for row in rows:
        shown = found.get(row.id, Shown())
        verdict = shown.verdict if shown.outcomes or not row.later else "later"
        tests = sorted(shown.outcomes)
        cells = [f"`{_short(test)}`" for test in tests[:MAX_SHOWN]]
        if len(tests) > MAX_SHOWN:
            cells.append(f"and {len(tests) - MAX_SHOWN} more")
        if row.later:
            cells.append(f"later: {row.later}")
        cells += [f"not run here: {reason}" for reason in sorted(shown.reasons)]
        lines.append(f"| {row.id} | {row.promise} | {verdict} | {'<br>'.join(cells).replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _short(test: str) -> str:
    return re.sub(r"^tests/(unit/|integration/|property/)?", "", test)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--prefix", default="", help="only rows whose id begins so")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if row.id.startswith(arguments.prefix)]
    found = collect(arguments.results.read_text().splitlines())
    print(terminal(rows, found))
    if arguments.write:
        arguments.write.write_text(page(rows, found))
    short = missing(rows, found)
    due = sum(not row.later for row in rows)
    print(f"acceptance: {due - len(short)} of {due} rows shown, {len(rows) - due} later")
    for row in short:
        print(f"acceptance: {row.id} is {found.get(row.id, Shown()).verdict}: {row.promise}", file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
