"""The list of breaks fits the code and the tests as they are now; `make acceptance-breaks` sees what it says."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.acceptance.break_it import page, problems, word
from tests.acceptance.breaks import BREAKS, Break
from tests.acceptance.rows import ROWS, Row

ROOT = Path(__file__).resolve().parents[2]
ROW = Row("T01", "it works")


def test_every_break_fits_and_every_row_that_is_due_has_one() -> None:
    assert problems(BREAKS, ROWS) == []


def test_the_page_tells_of_all_breaks_and_all_were_seen() -> None:
    assert (ROOT / "docs/acceptance-breaks.md").read_text() == page(BREAKS, ["red"] * len(BREAKS))


@pytest.fixture
def fitting(tmp_path: Path) -> Break:
    (tmp_path / "code.py").write_text("one = 1\ntwo = 2\n")
    (tmp_path / "test_code.py").write_text(
        'pytestmark = pytest.mark.row("T02")\n'
        '@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.row("T01"))])\n'
        "def test_one(n): ...\n"
        "def test_two(): ...\n"
    )
    return Break("T01", "code.py", "one = 1", "one = 2", "test_code.py::test_one[1]", "it counts wrong")


def test_a_break_that_fits_is_no_problem(fitting: Break, tmp_path: Path) -> None:
    assert problems([fitting], [ROW], tmp_path) == []
    assert problems([replace(fitting, row="T02")], [replace(ROW, id="T02")], tmp_path) == []


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("path", "other.py", "there is no other.py"),
        ("old", "three", "code.py has 'three' 0 times"),
        ("old", " = ", "code.py has ' = ' 2 times"),
        ("new", "one = 1", "it changes nothing"),
        ("test", "test_other.py::test_one", "there is no test_other.py"),
        ("test", "test_code.py::test_three", "there is no test_three in test_code.py"),
        ("test", "test_code.py::test_two", "test_two in test_code.py carries T02"),
    ],
)
def test_a_break_that_does_not_fit_is_named(
    fitting: Break, tmp_path: Path, field: str, value: str, problem: str
) -> None:
    changed = replace(fitting, **{field: value})  # type: ignore[arg-type]
    assert problems([changed], [ROW], tmp_path) == [f"T01, it counts wrong: {problem}"]


def test_a_row_that_is_due_and_has_no_break_is_named(fitting: Break, tmp_path: Path) -> None:
    rows = [ROW, Row("T02", "it is due"), Row("T03", "it is not", later="seeds")]
    assert problems([fitting], rows, tmp_path) == ["T02 is due and has no break"]
    assert problems([fitting], rows[1:], tmp_path)[0] == "T01 is no acceptance row"


@pytest.mark.parametrize(
    ("code", "outcomes", "last", "said"),
    [
        (0, {"passed"}, "2 passed in 1.00s", "green"),
        (1, {"failed", "passed"}, "1 failed, 1 passed in 1.00s", "red"),
        (1, {"failed"}, "1 error in 1.00s", "error"),
        (1, {"passed"}, "1 failed, 1 passed in 1.00s", "error"),
        (2, set(), "1 error in 1.00s", "error"),
        (4, set(), "no tests ran in 1.00s", "error"),
        (0, {"skipped"}, "1 skipped in 1.00s", "skipped"),
        (0, set(), "1 passed in 1.00s", "error"),
        (None, {"failed"}, "", "hang"),
    ],
)
def test_red_is_a_test_of_the_row_that_failed_and_nothing_else(
    code: int | None, outcomes: set[str], last: str, said: str
) -> None:
    assert word(code, outcomes, f"E   something\n{last}\n") == said
