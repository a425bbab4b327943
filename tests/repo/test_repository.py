"""The repository's promises about itself."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "proto/src", ROOT / "operator/src", ROOT / "runtime/src"]


def python_files(*roots: Path) -> list[Path]:
    return sorted(p for root in roots for p in root.rglob("*.py") if "_pb2" not in p.name)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def test_the_operator_folder_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "operator/__init__.py").exists()


def test_files_stay_readable() -> None:
    long = {str(p.relative_to(ROOT)): n for p in python_files(*SOURCES) if (n := len(p.read_text().splitlines())) > 500}
    assert long == {}


def test_functions_stay_readable() -> None:
    sizes = [size for path in python_files(*SOURCES) for size in functions(path)]
    assert [name for name, lines in sizes if lines > 80] == []
    ordered = sorted(lines for _, lines in sizes)
    assert ordered[int(len(ordered) * 0.9)] <= 40


def test_the_runtime_never_unpickles_or_evaluates() -> None:
    forbidden = re.compile(
        r"\bimport (pickle|marshal|shelve|dill)\b|torch\.load\(|torch\.save\(|(?<![\w.])(eval|exec)\("
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in python_files(ROOT / "runtime/src", ROOT / "proto/src")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line.split("#")[0])
    ]
    assert found == []


@pytest.mark.row("K61")
def test_broad_excepts_are_nowhere() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{handler.lineno}"
        for path in python_files(*SOURCES)
        for handler in ast.walk(ast.parse(path.read_text()))
        if isinstance(handler, ast.ExceptHandler)
        and (
            handler.type is None
            or (isinstance(handler.type, ast.Name) and handler.type.id in ("Exception", "BaseException"))
        )
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(handler))
        and "# broad:" not in path.read_text().splitlines()[handler.lineno - 1]
    ]
    assert found == [], "catch what can be mended, or say why on the line: `# broad: <reason>`"


@pytest.mark.row("K61")
def test_nothing_suppresses_whatever_comes() -> None:
    broad = {"Exception", "BaseException"}
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in python_files(*SOURCES)
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).endswith("suppress")
        and broad & {ast.unparse(argument) for argument in call.args}
    ]
    assert found == []


@pytest.mark.row("K61")
def test_an_error_that_leads_to_nothing_says_why() -> None:
    """On the line of the handler, or of its `pass`."""
    found = []
    for path in python_files(*SOURCES):
        text = path.read_text()
        lines = text.splitlines()
        found += [
            f"{path.relative_to(ROOT)}:{handler.lineno}"
            for handler in ast.walk(ast.parse(text))
            if isinstance(handler, ast.ExceptHandler)
            and all(isinstance(inner, ast.Pass) for inner in handler.body)
            and not any("#" in line for line in lines[handler.lineno - 1 : handler.body[-1].end_lineno])
        ]
    assert found == []


@pytest.mark.row("K61")
def test_there_is_one_path_and_no_adapter_for_an_older_one() -> None:
    """No code asks which version of a message it has, nor whether a library is there that it depends on."""
    found = []
    for path in python_files(*SOURCES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Try) and any(isinstance(part, ast.Import | ast.ImportFrom) for part in node.body):
                caught = " ".join(ast.unparse(h.type) for h in node.handlers if h.type is not None)
                if "ImportError" in caught or "ModuleNotFoundError" in caught:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def enums(*roots: Path) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Place, name and string values of every enum below `roots`."""
    for path in python_files(*roots):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
                values = {
                    item.value.value
                    for item in node.body
                    if isinstance(item, ast.Assign)
                    and isinstance(item.value, ast.Constant)
                    and isinstance(item.value.value, str)
                }
                yield str(path.relative_to(ROOT)), node.name, frozenset(values)


@pytest.mark.row("K15", "T28")
def test_no_enum_mirrors_one_of_leyline() -> None:
    """Two lists of the same words drift apart; what stays inside one module is its own business."""
    shared = list(enums(ROOT / "proto/src"))
    found = [
        f"{place}: {name} mirrors {other}"
        for place, name, values in enums(ROOT / "operator/src", ROOT / "runtime/src")
        for _, other, theirs in shared
        if name == other or (len(values) >= 2 and values <= theirs)
    ]
    assert shared
    assert found == []


@pytest.mark.parametrize("module", ["esper_operator.model", "esper_operator.decide", "esper_operator.main"])
def test_the_operator_loads_no_torch(module: str) -> None:
    code = f"import {module}, sys; assert not {{'torch', 'numpy', 'esper_runtime'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_images_run_as_numbers_and_pin_their_bases() -> None:
    text = (ROOT / "Dockerfile").read_text()
    users = re.findall(r"^USER (\S+)$", text, re.M)
    assert len(users) == 3
    assert all(re.fullmatch(r"\d+:\d+", user) for user in users)
    assert ":latest" not in text
    assert re.findall(r"^ARG \w+_BASE=(\S+)$", text, re.M) == ["python:3.13-slim", "python:3.13-slim"]


def test_the_chart_carries_the_crd_that_crds_holds() -> None:
    crd = (ROOT / "crds/espertrainingruns.yaml").read_text()
    body = crd[crd.index("spec:") :]
    assert body in (ROOT / "charts/esper/templates/crd.yaml").read_text()


def test_dependency_lists_follow_the_lock() -> None:
    subprocess.run([ROOT / "scripts/lock", "--check"], check=True, cwd=ROOT)


def test_every_example_is_used_by_a_test() -> None:
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__))
    assert [e.name for e in sorted((ROOT / "examples").glob("*.yaml")) if e.name not in tests] == []


def test_the_read_order_of_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 80


def test_readme_reaches_its_first_command_in_a_hundred_words() -> None:
    text = (ROOT / "README.md").read_text()
    before = text.split("```", 1)[0]
    assert len(before.split()) <= 100
