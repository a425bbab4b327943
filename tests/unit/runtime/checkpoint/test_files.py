"""Bytes to and from the disk."""

import fcntl
import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
import xxhash
from esper_runtime.checkpoint import files
from esper_runtime.checkpoint.errors import AbandonedError
from esper_runtime.checkpoint.files import (
    ALIGN,
    CHUNK,
    Disk,
    Source,
    aligned_buffer,
    digest_file,
    digest_files,
    write_file,
)
from esper_runtime.checkpoint.manifest import FileDigest

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
    assert list(digest_files([Source(path=path, size=size, memory=buffer)], disk=disk)) == [digest]
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


def written(directory: Path, sizes: list[int], disk: Disk) -> tuple[list[Source], list[FileDigest]]:
    """Files of these sizes, each with memory to read it into."""
    sources, digests = [], []
    for number, size in enumerate(sizes):
        path = directory / f"file{number}"
        digests.append(write_file(path, [payload(size)], size=size, disk=disk))
        sources.append(Source(path=path, size=size, memory=aligned_buffer(size)))
    return sources, digests


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("sizes", [[5, 3 * CHUNK + 1, 0, 70_000, CHUNK], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], []])
def test_files_that_are_read_together_have_their_own_digests(tmp_path: Path, sizes: list[int], kept: bool):
    sources, digests = written(tmp_path, sizes, disk := Disk())
    if not kept:
        sources = [Source(path=source.path, size=source.size) for source in sources]
    assert list(digest_files(sources, disk=disk)) == digests
    for source in sources:
        assert source.memory is None or np.array_equal(source.memory[: source.size], payload(source.size))


class Gate:
    """A disk whose reads wait at a gate, and which can be watched from outside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.waiting = threading.Semaphore(0)
        self.reads = 0
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, *arguments: Any) -> int:
        self.reads += 1
        self.waiting.release()
        assert self.go.wait(60)
        return self._real(*arguments)

    def until_waiting(self, count: int) -> None:
        for _ in range(count):
            assert self.waiting.acquire(timeout=60)


def test_the_next_file_is_being_read_before_the_first_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources, digests = written(tmp_path, [CHUNK // 2, CHUNK], disk := Disk())
    gate, found = Gate(monkeypatch), []
    reader = threading.Thread(target=lambda: found.extend(digest_files(sources, disk=disk)))
    reader.start()
    gate.until_waiting(2)  # the first file is one read
    gate.go.set()
    reader.join(60)
    assert found == digests


def test_one_that_cannot_be_opened_is_told_of_in_its_turn(tmp_path: Path):
    for sizes in ([CHUNK * 3, 70_000, 9], [9, 9, 9]):
        directory = tmp_path / f"{sum(sizes)}"
        directory.mkdir()
        sources, digests = written(directory, sizes, disk := Disk())
        sources[1].path.unlink()
        with closing(digest_files(sources, disk=disk)) as found:
            assert next(found) == digests[0]
            with pytest.raises(FileNotFoundError, match="file1"):
                next(found)


@pytest.mark.parametrize("size", [9, 2 * CHUNK])
def test_one_that_cannot_be_read_is_told_of_in_its_turn(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch):
    sources, digests = written(tmp_path, [size, size, size], disk := Disk())
    real, ill = os.preadv, sources[1].path.stat().st_ino

    def preadv(descriptor: int, *rest: Any) -> int:
        if os.fstat(descriptor).st_ino == ill:
            raise OSError(5, "Input/output error")
        return real(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    with closing(digest_files(sources, disk=disk)) as found:
        assert next(found) == digests[0]
        with pytest.raises(OSError, match="Input/output error"):
            next(found)


def test_whoever_has_enough_ends_the_reads_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources, _ = written(tmp_path, [9, 20 * CHUNK], disk := Disk())
    before = set(os.listdir("/proc/self/fd"))
    found = digest_files(sources, disk=disk)
    next(found)
    gate = Gate(monkeypatch)
    gate.go.set()
    found.close()
    reads = gate.reads
    memory = sources[1].memory
    assert memory is not None
    memory[:] = 0
    assert set(os.listdir("/proc/self/fd")) == before
    assert gate.reads == reads < 10
    assert not memory.any()


def test_of_many_files_only_those_being_read_are_open(tmp_path: Path):
    sources, digests = written(tmp_path, [ALIGN * 20] * 50, disk := Disk())
    before = len(os.listdir("/proc/self/fd"))
    most = 0
    for number, found in enumerate(digest_files(sources, disk=disk)):
        assert found == digests[number]
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
    assert 2 <= most <= 6, "some are read ahead, however many there are"
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_abandoned_read_begins_no_other_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources, _ = written(tmp_path, [20 * CHUNK], disk := Disk())
    gate, enough, ended = Gate(monkeypatch), threading.Event(), []

    def read() -> None:
        try:
            list(digest_files(sources, disk=disk, stop=enough.is_set))
        except AbandonedError as error:
            ended.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    gate.until_waiting(2)
    enough.set()
    gate.go.set()
    reader.join(60)
    assert len(ended) == 1
    assert gate.reads <= 6


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_a_refusal_that_two_workers_meet_at_once_is_no_error(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
):
    size, disk = 4 * CHUNK, Disk()
    path = tmp_path / "file"
    digest = write_file(path, [payload(size)], size=size, disk=disk)
    real: Callable[..., int] = getattr(os, call)
    both, met, lock = threading.Barrier(2), [], threading.Lock()

    def refusing(descriptor: int, *rest: Any) -> int:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return real(descriptor, *rest)
        with lock:
            met.append(descriptor)
            first = len(met) <= 2
        if first:
            both.wait(60)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, call, refusing)
    if call == "preadv":
        assert digest_file(path, size=size, disk=disk) == digest
    else:
        assert write_file(tmp_path / "other", [payload(size)], size=size, disk=disk) == digest
    assert not disk.direct


def test_a_refusal_that_stays_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_file(tmp_path / "file", [payload(CHUNK)], size=CHUNK, disk=Disk())

    def refusing(*_: Any) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refusing)
    with pytest.raises(OSError, match="Invalid argument"):
        digest_file(tmp_path / "file", size=CHUNK, disk=Disk())


def test_large_memory_is_in_huge_pages_alone():
    buffer = aligned_buffer(CHUNK + ALIGN)
    assert len(buffer) % files._HUGE_PAGE == 0
    assert len(aligned_buffer(ALIGN + 1)) == 2 * ALIGN
