"""Whether a volume keeps what is written to it: tried on the volume itself, as far as trying can tell.

A probe sees which calls the filesystem accepts, and a mount table names filesystems that are known to forget. Neither
can see a disk that lies about its cache, or a network server that does: such a volume passes. Needs no torch.
"""

import errno
import mmap
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from esper_leyline.phases import Durability

MOUNTS = Path("/proc/self/mountinfo")
_BLOCK = 4096
_REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORGETFUL = {
    "tmpfs": "it is memory",
    "ramfs": "it is memory",
    "overlay": "it is the container's own layer and goes with the container",
}
_NO_BARRIER = frozenset({"nobarrier", "barrier=0"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What is known of a volume."""

    mode: Durability
    direct_io: bool
    filesystem: str
    """Its type, such as ext4; empty when the mount table does not say."""
    doubts: tuple[str, ...] = ()
    """Why what is written there may be lost; empty when nothing is known against it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """One line of the mount table."""

    point: str
    filesystem: str
    options: frozenset[str]


def probe(directory: Path, *, mounts: Path = MOUNTS) -> Probe:
    """Tries O_DSYNC, O_DIRECT and fsync of file and directory in `directory`. OSError when it cannot be written at all.

    A full volume cannot be tried: fsync is taken to work there.
    """
    mount = mount_of(directory, _read(mounts))
    filesystem = "" if mount is None else mount.filesystem
    forgets = _forgets(mount)
    path = directory / f".probe.{secrets.token_hex(4)}"
    try:
        dsync = _try_write(path, os.O_DSYNC)
        direct = _try_write(path, os.O_DIRECT)
        synced = _try_sync(path, os.O_RDONLY)
    finally:
        path.unlink(missing_ok=True)
    named = _try_sync(directory, os.O_RDONLY | os.O_DIRECTORY)
    doubts = [*forgets]
    if not (dsync or synced):
        doubts.append("neither O_DSYNC nor fsync is accepted")
    if not named:
        doubts.append("fsync of a directory is not accepted: a new checkpoint may lose its name")
    sure = not forgets and (dsync or synced)
    mode = (Durability.DSYNC if dsync else Durability.FSYNC) if sure else Durability.UNKNOWN
    return Probe(mode=mode, direct_io=direct, filesystem=filesystem, doubts=tuple(doubts))


def _forgets(mount: Mount | None) -> list[str]:
    if mount is None:
        return []
    why = [_FORGETFUL[mount.filesystem]] if mount.filesystem in _FORGETFUL else []
    why += [f"it is mounted with {option}" for option in sorted(mount.options & _NO_BARRIER)]
    return [f"{mount.filesystem}: {reason}" for reason in why]


def mount_of(path: Path, table: str) -> Mount | None:
    """The mount that `path` is on; None when the table does not say. Of mounts at one point the last one counts."""
    real = os.path.realpath(path)
    found: Mount | None = None
    for line in table.splitlines():
        left, dash, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if not dash or len(fields) < 6 or len(tail) < 3:
            continue
        point = fields[4].encode().decode("unicode_escape")
        if _holds(point, real) and (found is None or len(point) >= len(found.point)):
            options = frozenset(f"{fields[5]},{tail[2]}".split(","))
            found = Mount(point=point, filesystem=tail[0], options=options)
    return found


def _holds(point: str, path: str) -> bool:
    return point == "/" or path == point or path.startswith(f"{point}/")


def _read(mounts: Path) -> str:
    try:
        return mounts.read_text(errors="replace")
    except OSError:
        return ""


def _try_write(path: Path, flag: int) -> bool:
    """Whether a block can be written with this flag. A full volume says nothing about it: False."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flag, 0o600)
    except OSError as error:
        return _refused(error)
    try:
        with mmap.mmap(-1, _BLOCK) as block:  # aligned, as O_DIRECT asks
            os.pwrite(descriptor, block, 0)
    except OSError as error:
        return _refused(error)
    finally:
        os.close(descriptor)
    return True


def _refused(error: OSError) -> bool:
    if error.errno in _REFUSALS or error.errno in _FULL:
        return False
    raise error


def _try_sync(path: Path, flags: int) -> bool:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError:  # the probe's file, which a full volume did not take
        return True
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return False
    finally:
        os.close(descriptor)
    return True
