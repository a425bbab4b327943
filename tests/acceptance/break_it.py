"""Puts each break of breaks.py into a copy of the working tree and expects the test of its row to go red.

    python -m tests.acceptance.break_it [ROW ...] [--why] [--write docs/acceptance-breaks.md] [--check]

A test has to be green in the copy before it counts. Red is a test of the row that failed, not one that could not be
collected or prepared. Exit code 1 when a break stays green, does not fit its file, or a row that is due has none.
"""

import argparse
import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.breaks import BREAKS, WITHOUT, Break
from tests.acceptance.rows import BY_ID, ROWS, Row

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"esper_leyline": "proto/src", "esper_operator": "operator/src", "esper_runtime": "runtime/src"}
TIMEOUT_S = 240.0
"""Of one test."""
TRIES = 3
"""Of a test that was skipped, as one that measures does on an uneven machine."""
SHORTER = {"ESPER_TEST_KILL_EVERY": "5", "ESPER_TEST_DAMAGES": "300"}
"""Less of what some tests do thousands of times."""
GREEN, RED = "green", "red"


# What can be said without running anything


def problems(breaks: Sequence[Break], rows: Sequence[Row], root: Path = ROOT) -> list[str]:
    """Breaks that do not fit the files below `root`, and rows that are due and have none."""
    found = [f"{one.row}, {one.why}: {problem}" for one in breaks for problem in _misfits(one, root)]
    known = {row.id for row in rows}
    covered = {one.row for one in breaks}
    found += [f"{name} is no acceptance row" for name in sorted(covered - known)]
    found += [f"{name} has a break and is listed without one" for name in sorted(covered & set(WITHOUT))]
    due = [row.id for row in rows if not row.later]
    return found + [f"{name} is due and has no break" for name in due if name not in covered | set(WITHOUT)]


def _misfits(one: Break, root: Path) -> Iterator[str]:
    path = root / one.path
    if not path.exists():
        yield f"there is no {one.path}"
    elif (count := path.read_text().count(one.old)) != 1:
        yield f"{one.path} has {one.old!r} {count} times"
    elif one.old == one.new:
        yield "it changes nothing"
    file, _, name = one.test.partition("[")[0].partition("::")
    if not (root / file).exists():
        yield f"there is no {file}"
        return
    rows = rows_of(root / file, name.partition("::")[0])
    if rows is None:
        yield f"there is no {name} in {file}"
    elif one.row not in rows:
        yield f"{name} in {file} carries {', '.join(sorted(rows)) or 'no row'}"


def rows_of(file: Path, name: str) -> set[str] | None:
    """Rows that a test function, class or other name of a module carries; None when there is no such name."""
    common: set[str] = set()
    found: set[str] | None = None
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            found = {row for decorator in node.decorator_list for row in _marked(decorator)}
        elif isinstance(node, ast.Assign):
            targets = {target.id for target in node.targets if isinstance(target, ast.Name)}
            if "pytestmark" in targets:
                common = set(_marked(node.value))
            elif name in targets:
                found = set(_marked(node.value))
    return None if found is None else found | common


def _marked(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.row":
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


# The copy


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one test."""

    word: str
    """green, red, hang, skipped, or error: it could not be collected or prepared."""
    seconds: float
    detail: str = ""
    """The first line that says what failed."""


def copy_tree(root: Path, into: Path) -> None:
    """All files of the working tree that git does not ignore, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, target = root / name, into / name
        if source.is_symlink() or source.is_file():  # else it is deleted and still tracked
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


class Copy:
    """Where code is broken and tests run. Imports come from here, not from what is installed."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root = root
        self._scratch = scratch
        paths = os.pathsep.join(str(root / source) for source in SOURCES.values())
        self._environment = {**os.environ, **SHORTER, "PYTHONPATH": paths}
        self._runner: subprocess.Popen[str] | None = None
        self._times = itertools.count(1_000_000_000)
        self._unbroken: dict[Break, Result] = {}

    def require_own_code(self) -> None:
        """RuntimeError when the tests would import something else than this copy."""
        code = f"import {', '.join(SOURCES)}; print(*(m.__path__[0] for m in ({', '.join(SOURCES)},)), sep='\\n')"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.root,
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
        )
        for place, (package, source) in zip(done.stdout.splitlines(), SOURCES.items(), strict=True):
            if Path(place) != self.root / source / package:
                raise RuntimeError(f"{package} is imported from {place}, not from the copy")

    @contextmanager
    def broken(self, one: Break) -> Iterator[None]:
        path = self.root / one.path
        whole, stat = path.read_text(), path.stat()
        path.write_text(whole.replace(one.old, one.new))
        # Byte code is told from its source by seconds and size, and breaks may be equal in both.
        os.utime(path, (moment := next(self._times), moment))
        try:
            yield
        finally:
            path.write_text(whole)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def run_unbroken(self, breaks: Sequence[Break]) -> None:
        """All their tests in one go, which tells most of what `unbroken` is asked for."""
        tests = list(dict.fromkeys(one.test for one in breaks))
        _, _, entries = self._pytest(tests, timeout_s=TIMEOUT_S * len(tests))
        for one in breaks:
            if _outcomes(one, entries) == {"passed"}:
                self._unbroken[one] = Result(GREEN, 0.0)

    def unbroken(self, one: Break) -> Result:
        """How the test of a break does without it."""
        if one not in self._unbroken:
            self._unbroken[one] = self.run(one)
        return self._unbroken[one]

    def run(self, one: Break) -> Result:
        result = self._once(one)
        for _ in range(TRIES - 1):
            if result.word != "skipped":
                break
            result = self._once(one)
        return result

    def _once(self, one: Break) -> Result:
        began = time.monotonic()
        code, output, entries = self._pytest(["-x", one.test], timeout_s=TIMEOUT_S)
        return Result(word(code, _outcomes(one, entries), output), time.monotonic() - began, _detail(output))

    def _pytest(self, arguments: Sequence[str], *, timeout_s: float) -> tuple[int | None, str, list[dict[str, Any]]]:
        """(exit code, or None when it took too long; what was printed; what the plugin recorded)"""
        record, printed = self._scratch / "outcomes", self._scratch / "printed"
        record.write_text("")
        options = ["-q", "--tb=short", "--timeout=0", "-p", "no:cacheprovider"]
        options += ["-p", "tests.acceptance.plugin", "--acceptance", str(record)]
        job = {"arguments": [*options, *arguments], "output": str(printed), "timeout_s": timeout_s}
        runner = self._started()
        assert runner.stdin is not None
        assert runner.stdout is not None
        print(json.dumps(job), file=runner.stdin, flush=True)
        code: int | None = json.loads(runner.stdout.readline())
        return code, printed.read_text(), [json.loads(line) for line in record.read_text().splitlines()]

    def _started(self) -> "subprocess.Popen[str]":
        if self._runner is None:
            self._runner = subprocess.Popen(
                [sys.executable, "-m", "tests.acceptance.preloaded"],
                cwd=self.root,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._runner

    def close(self) -> None:
        if self._runner is not None:
            self._runner.communicate()


def _outcomes(one: Break, entries: Sequence[Mapping[str, Any]]) -> set[str]:
    """Of the test of a break, all its cases, as far as they carry the row."""
    return {
        entry["outcome"]
        for entry in entries
        if one.row in entry["rows"] and (entry["test"] == one.test or entry["test"].startswith(f"{one.test}["))
    }


def word(code: int | None, outcomes: set[str], output: str) -> str:
    """`outcomes` of the cases of the test, as the plugin recorded them."""
    if code is None:
        return "hang"
    last = output.strip().rpartition("\n")[2]
    if code == 1 and "failed" in outcomes and re.search(r"\b\d+ failed\b", last):  # not "1 error", as of a fixture
        return RED
    if code == 0 and outcomes == {"passed"}:
        return GREEN
    if code == 0 and outcomes <= {"passed", "skipped"} and outcomes:
        return "skipped"
    return "error"


def _detail(output: str) -> str:
    return next((line[1:].strip() for line in output.splitlines() if re.match(r"E\s+\S", line)), "")


# Going through the list


def judge(one: Break, copy: Copy) -> Result:
    """Red is as it should be. Anything but green without the break is an error of the list or of the test."""
    before = copy.unbroken(one)
    if before.word != GREEN:
        return Result("error", before.seconds, f"{before.word} without the break: {before.detail}")
    with copy.broken(one):
        after = copy.run(one)
    if after.word == "hang":
        return Result(RED if one.hang else "error", after.seconds, f"no end within {TIMEOUT_S:g} s")
    if after.word == GREEN:
        return Result("GREEN!", after.seconds)
    return after


def page(breaks: Sequence[Break], words: Sequence[str]) -> str:
    """Markdown; holds nothing that differs from one run to the next."""
    lines = [
        "# Breaks of the acceptance rows",
        "",
        "Written by `make acceptance-breaks`; do not edit. Each line is a bug that was put into a copy of the code and",
        "the test of [its row](acceptance.md) that went red for it. The list is `tests/acceptance/breaks.py`.",
        "",
        "| Row | The bug | In | Seen by | Result |",
        "|---|---|---|---|---|",
    ]
    for one, found in zip(breaks, words, strict=True):
        where, test = Path(one.path).name, re.sub(r"^tests/(unit/|integration/|property/)?", "", one.test)
        lines.append(f"| {one.row} | {one.why} | `{where}` | `{test}` | {found} |")
    lines += [f"| {row} | none: {why} | | | |" for row, why in WITHOUT.items()]
    return "\n".join(lines) + "\n"


def run(breaks: Sequence[Break], *, why: bool) -> list[Result]:
    """Prints a line for each as soon as it is known."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="esper-breaks-") as scratch:
        root = Path(scratch) / "copy"
        copy_tree(ROOT, root)
        with closing(Copy(root, Path(scratch))) as copy:
            copy.require_own_code()
            copy.run_unbroken(breaks)
            for one in breaks:
                results.append(judge(one, copy))
                _tell(one, results[-1], why=why)
    return results


def _tell(one: Break, result: Result, *, why: bool) -> None:
    print(f"{one.row}  {result.word:7} {result.seconds:6.1f} s  {one.why}  ({one.test})", flush=True)
    if result.detail and (why or result.word != RED):
        print(f"       {result.detail[:200]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="only the breaks of these rows")
    parser.add_argument("--check", action="store_true", help="run nothing: do the breaks fit, has each row one?")
    parser.add_argument("--why", action="store_true", help="also what the red tests said")
    parser.add_argument("--write", type=Path, help="a page of the results, of all rows")
    arguments = parser.parse_args()
    unknown = [row for row in arguments.rows if row not in BY_ID]
    if unknown or (arguments.rows and arguments.write):
        parser.error(f"no acceptance row {', '.join(unknown)}" if unknown else "--write is for all rows")
    chosen = [one for one in BREAKS if not arguments.rows or one.row in arguments.rows]
    wrong = problems(chosen, [BY_ID[row] for row in arguments.rows] or ROWS)
    for problem in wrong:
        print(f"breaks: {problem}", file=sys.stderr)
    if wrong or arguments.check:
        return 1 if wrong else 0
    began = time.monotonic()
    results = run(chosen, why=arguments.why)
    if arguments.write:
        arguments.write.write_text(page(chosen, [result.word for result in results]))
    red = sum(result.word == RED for result in results)
    print(f"breaks: {red} of {len(results)} seen, in {time.monotonic() - began:.0f} s")
    return 0 if red == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
