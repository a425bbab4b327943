"""What a probe of the volume finds, and what it makes of it."""

import errno
import os
from pathlib import Path

import pytest
from esper_leyline.phases import Durability
from esper_runtime.checkpoint import durability
from esper_runtime.checkpoint.durability import mount_of, probe

TABLE = """\
21 1 0:20 / / rw,relatime - overlay overlay rw,lowerdir=/l,upperdir=/u
22 21 0:21 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=1m
23 21 8:1 / /checkpoints rw,relatime shared:1 - ext4 /dev/sdb rw,data=ordered
24 21 8:2 / /checkpoints/old rw - ext4 /dev/sdc rw,nobarrier
25 21 8:3 / /with\\040blank rw - xfs /dev/sdd rw
nonsense
"""


@pytest.mark.parametrize(
    ("path", "filesystem"),
    [
        ("/", "overlay"),
        ("/elsewhere", "overlay"),
        ("/checkpoints", "ext4"),
        ("/checkpoints/uid/a00001", "ext4"),
        ("/checkpointsx", "overlay"),
        ("/dev/shm/x", "tmpfs"),
        ("/with blank/x", "xfs"),
    ],
)
def test_the_longest_mount_point_holds_a_path(path: str, filesystem: str):
    mount = mount_of(Path(path), TABLE)
    assert mount is not None
    assert mount.filesystem == filesystem


def test_without_a_table_nothing_is_known_of_the_filesystem(tmp_path: Path):
    assert mount_of(tmp_path, "") is None
    found = probe(tmp_path, mounts=tmp_path / "absent")
    assert found.filesystem == ""
    assert list(tmp_path.iterdir()) == [], "the probe leaves nothing behind"


def probed(tmp_path: Path, line: str) -> durability.Probe:
    table = tmp_path.parent / f"{tmp_path.name}.mounts"
    table.write_text(f"21 1 0:20 / {tmp_path} {line}\n")
    return probe(tmp_path, mounts=table)


def test_a_filesystem_that_takes_o_dsync_is_trusted(tmp_path: Path):
    found = probed(tmp_path, "rw - ext4 /dev/sda rw")
    assert (found.mode, found.filesystem, found.doubts) == (Durability.DSYNC, "ext4", ())


@pytest.mark.parametrize(
    ("line", "doubt"),
    [
        ("rw - tmpfs none rw", "tmpfs: it is memory"),
        ("rw - overlay none rw", "overlay: it is the container's own layer"),
        ("rw - ext4 /dev/sda rw,barrier=0", "ext4: it is mounted with barrier=0"),
    ],
)
def test_a_filesystem_that_forgets_is_named(tmp_path: Path, line: str, doubt: str):
    found = probed(tmp_path, line)
    assert found.mode is Durability.UNKNOWN
    assert found.doubts[0].startswith(doubt)


def refusing(monkeypatch: pytest.MonkeyPatch, *, flag: int = 0, sync_of: str = "") -> None:
    """A kernel that refuses a flag of open, or fsync of a directory or a file."""
    real_open, real_fsync = os.open, os.fsync

    def open_(path: object, flags: int, *rest: int, **more: int) -> int:
        if flag and flags & flag == flag:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest, **more)  # type: ignore[arg-type]

    def fsync(descriptor: int) -> None:
        kind = "directory" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file"
        if kind in sync_of:
            raise OSError(errno.EINVAL, "Invalid argument")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)


def test_without_o_dsync_fsync_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refusing(monkeypatch, flag=os.O_DSYNC)
    found = probed(tmp_path, "rw - ext4 /dev/sda rw")
    assert (found.mode, found.doubts) == (Durability.FSYNC, ())


def test_without_fsync_of_directories_names_are_in_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refusing(monkeypatch, sync_of="directory")
    found = probed(tmp_path, "rw - nfs server rw")
    assert found.mode is Durability.DSYNC
    assert "may lose its name" in found.doubts[0]


def test_without_both_nothing_is_known_to_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refusing(monkeypatch, flag=os.O_DSYNC, sync_of="file")
    found = probed(tmp_path, "rw - fuse x rw")
    assert found.mode is Durability.UNKNOWN
    assert found.doubts == ("neither O_DSYNC nor fsync is accepted",)


def test_an_error_that_is_no_refusal_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        probe(tmp_path)
    assert list(tmp_path.iterdir()) == []
