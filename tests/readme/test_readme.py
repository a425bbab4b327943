"""README.md's commands that need no cluster, run as they stand. Those of a cluster: tests/e2e/test_zzz_readme.py."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import readme


def shell(command: str, folder: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    path = f"{readme.ROOT / '.venv/bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    print(done.stdout, done.stderr)
    return done


def test_every_block_of_commands_is_run_by_a_test() -> None:
    assert readme.headings_with_commands() == {"", "On a cluster", "Your own model"}


@pytest.mark.timeout(1200)
def test_the_demo_survives_its_nan_and_says_so() -> None:
    first, second = readme.commands("")
    assert (first, second) == ("make demo", "make test")
    done = shell(first, readme.ROOT, 1100)
    assert done.returncode == 0, done.stderr[-4000:]
    shown = done.stdout + done.stderr
    assert re.search(r"Running\s.*RollingBack", shown)
    assert "Succeeded" in shown
    assert shell(f"make -n {second.split()[1]}", readme.ROOT, 60).returncode == 0


@pytest.mark.timeout(600)
def test_own_code_runs_on_this_machine(tmp_path: Path) -> None:
    shutil.copytree(readme.ROOT / "examples", tmp_path / "examples")
    for command in readme.commands("Your own model"):
        done = shell(command, tmp_path, 500)
        assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"
    assert json.loads((tmp_path / "spiral/model.json").read_text())
    assert (tmp_path / "spiral/model.safetensors").stat().st_size > 1000
