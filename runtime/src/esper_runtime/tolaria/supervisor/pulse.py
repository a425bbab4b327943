"""Whether a silent trainer works: processor time, bytes and thread states of it and all it started, from /proc."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from esper_runtime.tolaria.supervisor.hang import Pulse

MAX_PROCESSES = 256
PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_WANTS = frozenset("RDt")
"""Runs or could, waits for a disk, is held by a debugger."""
_STATE, _USER, _SYSTEM = 0, 11, 12
"""Of a stat line behind the command's name."""


def take(pid: int, *, proc: Path = PROC) -> Pulse | None:
    """None when /proc does not tell, or there is no such process any more."""
    cpu_ticks = io_bytes = 0
    wants = False
    try:
        for process in _tree(pid, proc):
            fields = _stat(process / "stat")
            cpu_ticks += int(fields[_USER]) + int(fields[_SYSTEM])
            wants = wants or any(state in _WANTS for state in _states(process))
            with suppress(PermissionError):
                io_bytes += _io(process)
    except (OSError, ValueError, IndexError):
        return None  # something ended meanwhile: the next look will tell
    return Pulse(cpu_s=cpu_ticks / _TICKS, io_bytes=io_bytes, wants=wants)


def _tree(pid: int, proc: Path) -> Iterator[Path]:
    """The process and its descendants, at most MAX_PROCESSES."""
    waiting, count = [pid], 0
    while waiting and count < MAX_PROCESSES:
        process = proc / str(waiting.pop())
        count += 1
        yield process
        for task in sorted((process / "task").iterdir()):
            with suppress(FileNotFoundError):  # a thread that ended, or a kernel that does not tell children
                waiting += [int(word) for word in (task / "children").read_text().split()]


def _states(process: Path) -> Iterator[str]:
    for task in (process / "task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            yield _stat(task / "stat")[_STATE]


def _stat(path: Path) -> list[str]:
    """Fields behind the command's name, which may hold anything."""
    return path.read_text(errors="replace").rpartition(")")[2].split()


def _io(process: Path) -> int:
    """Bytes through read and write, and to and from disks."""
    counts = dict(line.split(": ") for line in (process / "io").read_text().splitlines())
    return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
