"""The user's API is frozen: it changes only together with tests/golden/workload_api.txt, and it is documented whole.

After a change that is meant: ESPER_RECORD=1 pytest tests/unit/runtime/test_workload_api.py
"""

import ast
import dataclasses
import os
import re
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from esper_runtime import schedules, workload
from esper_runtime.workload import Workload

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests/golden/workload_api.txt"
PAGE = ROOT / "docs/reference/workload.md"


def default_of(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


SCHEDULES = frozenset(
    {"Constant", "Cosine", "Frozen", "Linear", "Plateau", "Schedule", "ScheduleError", "Step", "read"}
)
"""What users write of esper_runtime.schedules, or find in an error."""


def description(module: ModuleType, offered: Collection[str]) -> str:
    """What the source promises of these names, without bodies: fields, arguments, annotations, defaults."""
    lines = [line for node in ast.parse(Path(str(module.__file__)).read_text()).body for line in promises(node)]
    return "\n".join(line for line in lines if re.split(r"\W", line)[0] in offered and "(self" not in line)


def promises(node: ast.stmt, prefix: str = "") -> list[str]:
    """A line per public name that a statement defines, and per public name within it."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return _public(prefix, node.name, f"({ast.unparse(node.args)}){returns}")
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        head = _public(prefix, node.name, f"({bases})")
        return head + [line for inner in node.body if head for line in promises(inner, f"{prefix}{node.name}.")]
    if isinstance(node, ast.AnnAssign):
        default = f" = {ast.unparse(node.value)}" if node.value else ""
        return _public(prefix, ast.unparse(node.target), f": {ast.unparse(node.annotation)}{default}")
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) != "__all__":
        return _public(prefix, ast.unparse(node.targets[0]), f" = {ast.unparse(node.value)}")
    return []


def _public(prefix: str, name: str, rest: str) -> list[str]:
    return [] if name.lstrip("(").startswith("_") else [f"{prefix}{name}{rest}"]


def test_the_api_is_the_recorded_one():
    found = f"{description(workload, workload.__all__)}\n\n{description(schedules, SCHEDULES)}\n"
    if os.environ.get("ESPER_RECORD"):
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text(), "the user's API changed: see the head of this file"


def rows() -> dict[str, str]:
    """Field -> default, as the reference page has it."""
    section = PAGE.read_text().partition("## Fields of Workload")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", section, re.M)
    return {name: default.strip("`") for name, default, meaning in found if meaning.strip()}


def test_every_field_is_documented_with_its_default_and_none_that_does_not_exist():
    assert rows() == {field.name: default_of(field) for field in dataclasses.fields(Workload)}


@pytest.mark.parametrize("name", workload.__all__)
def test_every_public_name_is_documented(name: str):
    assert f"`{name}`" in PAGE.read_text()


def test_links_of_the_page_lead_somewhere():
    broken = [
        link
        for link in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
        if "://" not in link and not (PAGE.parent / link).exists()
    ]
    assert broken == []
