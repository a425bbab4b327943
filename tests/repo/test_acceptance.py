"""The acceptance table itself: marks name rows that exist, and the verdicts are what they say."""

import ast
import json
from pathlib import Path

import pytest

from tests.acceptance.rows import BY_ID, ROWS, Row
from tests.acceptance.table import collect, missing, page, terminal

TESTS = Path(__file__).resolve().parents[1]


def marked_rows() -> set[str]:
    found: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.row":
                found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}  # type: ignore[misc]
    return found


def test_ids_are_unique_and_marks_name_them() -> None:
    assert len(BY_ID) == len(ROWS)
    assert marked_rows() - set(BY_ID) == set()


def entry(test: str, row: str, outcome: str, why: str = "") -> str:
    return json.dumps({"test": test, "rows": [row], "outcome": outcome, "why": why})


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([], "no test"),
        (["skipped"], "not run here"),
        (["skipped", "passed"], "passed"),
        (["passed", "failed"], "failed"),
    ],
)
def test_a_row_is_shown_only_by_a_test_that_ran_and_passed(outcomes: list[str], verdict: str) -> None:
    row = Row("T01", "it works")
    found = collect(entry(f"tests/x.py::test[{n}]", "T01", outcome) for n, outcome in enumerate(outcomes))
    assert missing([row], found) == ([] if verdict == "passed" else [row])
    assert verdict in terminal([row], found)
    assert f"| {verdict} |" in page([row], found)


def test_later_work_is_not_missing_and_says_what_it_waits_for() -> None:
    row = Row("T08", "it grows", later="seeds")
    assert missing([row], {}) == []
    assert "later: seeds" in terminal([row], {})
    assert "later: seeds" in page([row], {})
