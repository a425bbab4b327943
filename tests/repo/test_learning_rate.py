"""Only tolaria/learning_rate.py sets learning rates."""

import re
from pathlib import Path

import pytest

RUNTIME = Path(__file__).resolve().parents[2] / "runtime/src"
WRITER = RUNTIME / "esper_runtime/tolaria/learning_rate.py"
WRITES = re.compile(
    r"""\[["']lr["']\]\s*(=(?!=)|[-+*/]=|\.\w+_\()"""  # group["lr"] = ..., *= ..., .fill_(...)
    r"""|\blr\.(fill|mul|copy|zero|add|sub|div)_\("""
    r"""|\blr_scheduler\b"""
)


def writes(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [f"{path.name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if WRITES.search(line)]


@pytest.mark.row("T12")
def test_nothing_else_in_the_runtime_sets_a_learning_rate():
    assert [found for path in sorted(RUNTIME.rglob("*.py")) if path != WRITER for found in writes(path)] == []
    assert len(writes(WRITER)) == 2, "the pattern no longer sees the writer itself"


@pytest.mark.row("T12")
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('group["lr"] = 0.1', True),
        ("group['lr'] *= 2", True),
        ('group["lr"].fill_(0.1)', True),
        ("lr.mul_(2)", True),
        ("from torch.optim import lr_scheduler", True),
        ('if group["lr"] == 0.1:', False),
        ('rate = group["lr"]', False),
    ],
)
def test_the_pattern_tells_writing_from_reading(line: str, found: bool):
    assert bool(WRITES.search(line)) is found
