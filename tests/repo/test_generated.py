"""Generated files are those that the sources give, and the sources pass the wire's own linter."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path = ROOT) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.row("T28")
def test_generated_files_are_current() -> None:
    run(sys.executable, "scripts/generate.py", "--check")


@pytest.mark.row("T28")
def test_a_stub_that_lags_behind_its_source_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "proto", tmp_path / "proto", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    with (tmp_path / "proto/esper_leyline/v1/common.proto").open("a") as source:
        source.write("message Stray { string name = 1; }\n")
    done = subprocess.run(
        [sys.executable, "scripts/generate.py", "--check"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 1
    assert "stale: proto/src/esper_leyline/v1/common_pb2.py (run scripts/generate)" in done.stderr
    assert "bus_pb2.py" not in done.stderr


def test_the_wire_passes_its_linter() -> None:
    run(str(Path(sys.executable).with_name("buf")), "lint", cwd=ROOT / "proto")
