"""What a hung trainer looked like: its own stack dump and the kernel's view, kept on the checkpoint volume.

faulthandler needs a process that runs. One that is stopped, or stuck in the kernel, is described from outside.
"""

import logging
import os
import re
from contextlib import suppress
from pathlib import Path

MAX_DUMP_BYTES = 16 * 1024
MAX_TOLD_BYTES = 1500
MAX_THREADS = 32
MAX_FILES = 8
"""Of one attempt; the oldest go."""
PROC = Path("/proc")
_NAME = re.compile(r"stacks-(\d{1,9})\.txt")
log = logging.getLogger(__name__)


class Evidence:
    """Of one container. `dump_file` is where the trainer's faulthandler writes, `directory` is on the volume."""

    def __init__(self, dump_file: Path, directory: Path) -> None:
        self._dump_file = dump_file
        self._directory = directory
        self._why = ""
        self._outside = ""
        self.told = ""
        """Of the newest death, when it was a hang."""
        self.file = ""
        """Where the rest of it is kept, below the run's directory; empty when it is not."""

    def look(self, pid: int, why: str) -> None:
        """A hang was noticed, and the trainer still stands as it does."""
        self._why, self._outside = why, from_outside(pid)
        log.error("the hung trainer from outside:\n%s", self._outside)

    def keep(self) -> str:
        """Once the trainer is dead: writes what is known to log and volume, and tells it shortly. Empty without a hang.

        The log has it whole because the run directory goes with the pod.
        """
        self.told = self.file = ""
        if not self._why:
            return ""
        why, self._why = self._why, ""
        dump = own_dump(self._dump_file)
        if dump:
            log.error("stacks of the hung trainer:\n%s", dump)
        kept = keep(self._directory, why=why, dump=dump, outside=self._outside)
        if kept is not None:
            self.file = f"{kept.parent.name}/{kept.name}"
            why = f"{why} (stacks in {self.file})"
        self.told = f"{why}\n{told(dump, self._outside)}"
        return self.told


def from_outside(pid: int, *, proc: Path = PROC) -> str:
    """A line per thread: name, state letter, what it waits for in the kernel, and its kernel stack where one may look.

    A process that is gone gives nothing.
    """
    lines = []
    try:
        tasks = sorted((proc / str(pid) / "task").iterdir(), key=lambda task: int(task.name))
    except OSError:
        return ""
    for task in tasks[:MAX_THREADS]:
        name, state, waits = _first_line(task / "comm"), _state(task), _first_line(task / "wchan")
        stack = " < ".join(_kernel_stack(task))
        lines.append(f"thread {task.name} {name}: {state}, waits in {waits or '?'}" + (f" ({stack})" if stack else ""))
    if len(tasks) > MAX_THREADS:
        lines.append(f"and {len(tasks) - MAX_THREADS} threads more")
    return "\n".join(lines)


def _state(task: Path) -> str:
    """For people, such as `T (stopped)`."""
    with suppress(OSError):
        for line in (task / "status").read_text(errors="replace").splitlines():
            if line.startswith("State:"):
                return line.partition(":")[2].strip()
    return "?"


def _first_line(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace").strip()[:64]
    return ""


def _kernel_stack(task: Path) -> list[str]:
    """Names of the innermost functions; empty without the privilege to see them."""
    with suppress(OSError):
        lines = (task / "stack").read_text(errors="replace").splitlines()[:8]
        return [line.rpartition("] ")[2].partition("+")[0] for line in lines]
    return []


def own_dump(path: Path) -> str:
    """What faulthandler wrote on SIGUSR1, at most MAX_DUMP_BYTES; empty when it could not."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(MAX_DUMP_BYTES).decode("utf-8", "replace")
    return ""


def told(dump: str, outside: str) -> str:
    """The most telling part for lastFailure: the main thread's Python stack, or why there is none."""
    if dump:
        return dump[-MAX_TOLD_BYTES:]
    return f"it wrote no Python stacks; seen from outside:\n{outside}"[:MAX_TOLD_BYTES]


def keep(directory: Path, *, why: str, dump: str, outside: str) -> Path | None:
    """Writes both to stacks-<n>.txt below `directory` and removes the oldest. None when that fails, which is logged."""
    try:
        numbers = sorted(int(match[1]) for name in os.listdir(directory) if (match := _NAME.fullmatch(name)))
        path = directory / f"stacks-{numbers[-1] + 1 if numbers else 1}.txt"
        text = (
            f"{why}\n\nSeen from outside:\n{outside}\n\nPython stacks:\n{dump or 'none: it did not answer SIGUSR1'}\n"
        )
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        for number in numbers[: max(0, len(numbers) + 1 - MAX_FILES)]:
            (directory / f"stacks-{number}.txt").unlink(missing_ok=True)
    except OSError as error:
        log.error("cannot keep the stacks of the hung trainer in %s: %s", directory, error)
        return None
    return path
