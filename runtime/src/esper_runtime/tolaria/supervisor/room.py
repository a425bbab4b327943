"""How much memory a process takes for itself, and how much this container has left."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)
"""cgroup v2, then v1, as a container sees its own: limit, usage, statistics, and what of the usage is mere cache."""
MEMINFO = "/proc/meminfo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Bytes."""

    limit: int
    left: int


def measure(cgroups: tuple[tuple[str, str, str, str], ...] = _CGROUPS, meminfo: str = MEMINFO) -> Room | None:
    """The tighter of the container's limit and the machine's memory; None where the kernel tells neither."""
    rooms = [room for room in (*(_cgroup(*files) for files in cgroups), _machine(meminfo)) if room is not None]
    return min(rooms, key=lambda room: room.left, default=None)


def _cgroup(limit_file: str, usage_file: str, stat_file: str, cache: str) -> Room | None:
    with suppress(OSError, ValueError):
        limit = int(Path(limit_file).read_text())  # ValueError for "max": no limit
        usage = int(Path(usage_file).read_text())
        return Room(limit=limit, left=limit - usage + int(_lines(stat_file, " ").get(cache, "0")))
    return None


def _machine(meminfo: str) -> Room | None:
    with suppress(OSError, KeyError, ValueError):
        lines = _lines(meminfo, ":")
        return Room(limit=_kib(lines["MemTotal"]), left=_kib(lines["MemAvailable"]))
    return None


def private_bytes(pid: int) -> int | None:
    """Memory that the process shares with no file and nobody; None when it is gone."""
    with suppress(OSError, KeyError, ValueError):
        return _kib(_lines(f"/proc/{pid}/status", ":")["RssAnon"])
    return None


def _lines(path: str, separator: str) -> dict[str, str]:
    pairs = (line.partition(separator) for line in Path(path).read_text().splitlines())
    return {key: value.strip() for key, _, value in pairs}


def _kib(words: str) -> int:
    return int(words.split()[0]) * 1024
