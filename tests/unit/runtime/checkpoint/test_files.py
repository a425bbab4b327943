"""Bytes to and from the disk."""

import os
from pathlib import Path

import crc32c
import numpy as np
import pytest
import xxhash
from esper_runtime.checkpoint.files import (
    ALIGN,
    CHUNK,
    Disk,
    aligned_buffer,
    digest_file,
    read_file,
    write_file,
)

SIZES = [0, 1, ALIGN - 1, ALIGN, ALIGN + 1, 65536, 65537, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 4097]


def payload(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_comes_back_with_its_digests(tmp_path: Path, size: int, direct: bool):
    data, path, disk = payload(size), tmp_path / "file", Disk(direct=direct)
    parts = [data[: size // 3], data[size // 3 : size // 3 + 5], data[size // 3 + 5 :]]
    digest = write_file(path, parts, size=size, disk=disk)
    assert path.read_bytes() == data.tobytes()
    assert digest.crc32c == f"{crc32c.crc32c(data.tobytes()):08x}"
    assert digest.xxh3_128 == xxhash.xxh3_128_hexdigest(data.tobytes())
    buffer = aligned_buffer(size)
    assert read_file(path, buffer, size=size, disk=disk) == digest
    assert np.array_equal(buffer[:size], data)
    assert digest_file(path, size=size, disk=disk) == digest


def test_a_shorter_file_has_another_digest(tmp_path: Path):
    size = 2 * CHUNK
    digest = write_file(tmp_path / "file", [payload(size)], size=size, disk=Disk())
    os.truncate(tmp_path / "file", size - 1)
    found = digest_file(tmp_path / "file", size=size, disk=Disk())
    assert found != digest
    assert found.size == size - 1


def test_an_existing_file_is_never_overwritten(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", [payload(9)], size=9, disk=Disk())
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("refused_at", ["open", "write"])
def test_a_filesystem_without_direct_io_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_at: str):
    real_open, real_pwrite = os.open, os.pwrite
    asked = []

    def refusing_open(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            asked.append(path)
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, mode)

    def refusing_pwrite(descriptor, data, offset):
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            asked.append(descriptor)
            raise OSError(22, "Invalid argument")
        return real_pwrite(descriptor, data, offset)

    if refused_at == "open":
        monkeypatch.setattr(os, "open", refusing_open)
    else:
        monkeypatch.setattr(os, "pwrite", refusing_pwrite)
    disk, data = Disk(), payload(CHUNK + 3)
    for name in ("one", "two"):
        write_file(tmp_path / name, [data], size=len(data), disk=disk)
        assert (tmp_path / name).read_bytes() == data.tobytes()
    assert not disk.direct
    assert 1 <= len(asked) <= 2  # two workers may both meet the first refusal


def test_a_durable_file_costs_one_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(descriptor), real(descriptor)))
    write_file(tmp_path / "file", [payload(CHUNK * 3)], size=CHUNK * 3, disk=Disk())
    assert len(calls) == 1
