"""The kernel's count of processes of this container that it killed for memory."""

from pathlib import Path

_FILES = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
"""cgroup v2, then v1, as a container sees its own."""


def oom_kills(files: tuple[str, ...] = _FILES) -> int | None:
    """None where the kernel does not tell."""
    for name in files:
        try:
            lines = Path(name).read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for line in lines:
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.strip().isdigit():
                return int(value)
    return None
