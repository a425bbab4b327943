"""Builds shim.c and gives the environment of a process that runs behind it."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("shim.c")


class Shim:
    """Faults on files below `watched`, switched on and off while the process runs."""

    def __init__(self, library: Path, watched: Path, control: Path) -> None:
        self.library = library
        self.environment = {"LD_PRELOAD": str(library), "SHIM_DIR": f"{watched}/", "SHIM_CONTROL": str(control)}
        self._control = control

    def inject(self, *faults: tuple[str, int, int]) -> None:
        """(op, errno, milliseconds) each; errno 0 only delays. None: all is well again."""
        draft = self._control.with_suffix(".new")
        draft.write_text("".join(f"{op} {error} {ms}\n" for op, error, ms in faults))
        draft.replace(self._control)


def build(directory: Path) -> Path:
    """The library; skips where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) to build the shim with")
    library = directory / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library
