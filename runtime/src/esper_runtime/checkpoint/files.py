"""Bytes to and from the disk: preallocated, past the page cache where the filesystem allows, digested on the way.

Both directions overlap: worker threads move chunks while the caller's thread computes digests, so that the
digests cost no time beyond the disk's own.
"""

import errno
import fcntl
import logging
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeAlias, TypeVar

import crc32c
import numpy as np
import numpy.typing as npt
import xxhash

from esper_runtime.checkpoint.errors import AbandonedError
from esper_runtime.checkpoint.manifest import FileDigest
from esper_runtime.checkpoint.volume import preallocate

ALIGN = 4096
CHUNK = 4 * 1024 * 1024
_BUFFERS = 4
_WORKERS = 2
_DIRECT_MIN_BYTES = 64 * 1024
_REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP})

Bytes: TypeAlias = npt.NDArray[np.uint8]
Stop: TypeAlias = Callable[[], bool]
"""Asked between chunks; True ends a read with AbandonedError."""
P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)


class Disk:
    """How to open files on one filesystem. Remembers once that it refuses direct I/O."""

    def __init__(self, *, direct: bool = True) -> None:
        self.direct = direct and hasattr(os, "O_DIRECT")
        self.dsync = False
        """Whether what commits a generation is written with O_DSYNC too; the probe of the volume decides."""

    def open(self, path: Path, flags: int, *, direct: bool, commits: bool = False) -> int:
        flags |= os.O_CLOEXEC | (os.O_DSYNC if commits and self.dsync else 0)
        if direct and self.direct:
            try:
                return os.open(path, flags | os.O_DIRECT, 0o640)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._give_up(path)
                flags &= ~os.O_EXCL  # the refused open may have created it
        return os.open(path, flags, 0o640)

    def to_buffered(self, descriptor: int, path: Path) -> bool:
        """Switches an open file to buffered I/O after a refusal; False when it was buffered already."""
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if not flags & os.O_DIRECT:
            return False
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._give_up(path)
        return True

    def _give_up(self, path: Path) -> None:
        if self.direct:
            log.info("no direct I/O at %s; using the page cache", path.parent)
        self.direct = False


class Digester:
    """Both checksums of a stream of chunks."""

    def __init__(self) -> None:
        self._size = 0
        self._crc = 0
        self._xxh = xxhash.xxh3_128()

    def update(self, chunk: Bytes) -> None:
        self._size += len(chunk)
        self._crc = crc32c.crc32c(chunk.data, self._crc)
        self._xxh.update(chunk.data)

    def result(self) -> FileDigest:
        return FileDigest(size=self._size, crc32c=f"{self._crc:08x}", xxh3_128=self._xxh.hexdigest())


def align_up(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def aligned_buffer(size: int) -> Bytes:
    """Fresh zeroed memory of at least `size` bytes, page-aligned, in huge pages where there are any."""
    # Private: shared anonymous memory is a file to the kernel, which gets no huge pages.
    region = mmap.mmap(-1, max(align_up(size), ALIGN), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            region.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages
                raise
    return np.frombuffer(region, dtype=np.uint8)


def write_file(path: Path, parts: Iterable[Bytes], *, size: int, disk: Disk, commits: bool = False) -> FileDigest:
    """Creates `path` from `parts` (together `size` bytes), durable on return. OSError leaves a partial file behind."""
    return _create(path, size, disk, lambda descriptor: _pump(descriptor, parts, size, path, disk), commits=commits)


def write_memory(path: Path, memory: Bytes, *, size: int, disk: Disk) -> FileDigest:
    """As write_file, from the first `size` bytes of an aligned_buffer, without a copy on the way."""
    return _create(path, size, disk, lambda descriptor: _pump_memory(descriptor, memory, size, path, disk))


def _create(
    path: Path, size: int, disk: Disk, fill: Callable[[int], FileDigest], *, commits: bool = False
) -> FileDigest:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    descriptor = disk.open(path, flags, direct=size >= _DIRECT_MIN_BYTES, commits=commits)
    try:
        preallocate(descriptor, align_up(size))
        digest = fill(descriptor)
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    assert digest.size == size, f"{path}: announced {size} bytes, wrote {digest.size}"
    return digest


def _pump(descriptor: int, parts: Iterable[Bytes], size: int, path: Path, disk: Disk) -> FileDigest:
    digester = Digester()
    buffers = _ring(size)
    in_flight: list[Future[None] | None] = [None] * len(buffers)

    def free_buffer(turn: int) -> Bytes:
        waiting = in_flight[turn % len(buffers)]
        if waiting is not None:
            waiting.result()
        return buffers[turn % len(buffers)]

    with _workers(size) as pool:
        offset = 0
        for turn, chunk in enumerate(_chunks(parts, free_buffer)):
            # Direct I/O moves whole blocks; what follows the last byte is cut off by ftruncate.
            padded = buffers[turn % len(buffers)][: align_up(len(chunk))]
            in_flight[turn % len(buffers)] = pool.submit(_write_at, descriptor, padded, offset, path, disk)
            digester.update(chunk)
            offset += len(chunk)
        for waiting in in_flight:
            if waiting is not None:
                waiting.result()
    return digester.result()


def _pump_memory(descriptor: int, memory: Bytes, size: int, path: Path, disk: Disk) -> FileDigest:
    digester = Digester()
    in_flight: deque[Future[None]] = deque()
    with _workers(size) as pool:
        for start in range(0, size, CHUNK):
            if len(in_flight) == _BUFFERS:
                in_flight.popleft().result()
            padded = memory[start : min(start + CHUNK, align_up(size))]
            in_flight.append(pool.submit(_write_at, descriptor, padded, start, path, disk))
            digester.update(memory[start : min(start + CHUNK, size)])
        for waiting in in_flight:
            waiting.result()
    return digester.result()


class _Here(Executor):
    """Runs at once, in the caller's thread: a file of one chunk has nothing to overlap."""

    def submit(self, run: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(run(*args, **kwargs))
        return future


def _workers(size: int) -> Executor:
    return _Here() if size <= CHUNK else ThreadPoolExecutor(_WORKERS, thread_name_prefix="checkpoint-io")


def _ring(size: int) -> list[Bytes]:
    """Chunks for a file of `size` bytes: as many and as large as it can use."""
    return [aligned_buffer(min(size, CHUNK)) for _ in range(max(1, min(_BUFFERS, -(-size // CHUNK))))]


def _chunks(parts: Iterable[Bytes], free_buffer: Callable[[int], Bytes]) -> Iterator[Bytes]:
    """Packs `parts` into full chunks of aligned memory; only the last one is shorter."""
    turn, used = 0, 0
    buffer: Bytes | None = None
    for part in parts:
        taken = 0
        while taken < len(part):
            if buffer is None:
                buffer, used = free_buffer(turn), 0
            length = min(CHUNK - used, len(part) - taken)
            np.copyto(buffer[used : used + length], part[taken : taken + length])
            used += length
            taken += length
            if used == CHUNK:
                yield buffer
                buffer = None
                turn += 1
    if buffer is not None:
        yield buffer[:used]


def _write_at(descriptor: int, data: Bytes, offset: int, path: Path, disk: Disk) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:].data, offset + done)
        except OSError as error:
            if error.errno not in _REFUSALS or not disk.to_buffered(descriptor, path):
                raise


def go_on() -> bool:
    """A Stop that never stops."""
    return False


def read_file(path: Path, buffer: Bytes, *, size: int, disk: Disk, stop: Stop = go_on) -> FileDigest:
    """Fills `buffer` (from aligned_buffer) with the file's first `size` bytes and digests them.

    A shorter file gives a digest of what is there; the caller compares.
    """
    return _stream(path, size, disk, lambda _, start: buffer[start : min(start + CHUNK, align_up(size))], stop)


def digest_file(path: Path, *, size: int, disk: Disk, stop: Stop = go_on) -> FileDigest:
    """As read_file, without keeping what was read."""
    ring = _ring(size)
    return _stream(path, size, disk, lambda turn, _: ring[turn % len(ring)], stop)


def _stream(path: Path, size: int, disk: Disk, place: Callable[[int, int], Bytes], stop: Stop) -> FileDigest:
    """Reads chunks to where `place(turn, start)` says; at most _BUFFERS are under way, digested in order."""
    descriptor = disk.open(path, os.O_RDONLY, direct=size >= _DIRECT_MIN_BYTES)
    digester = Digester()
    reads: deque[tuple[Bytes, Future[int]]] = deque()

    def digest_oldest() -> None:
        target, read = reads.popleft()
        digester.update(target[: read.result()])

    try:
        # After a buffered write the pages in memory would verify themselves, not the disk.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with _workers(size) as pool:
            for turn, start in enumerate(range(0, size, CHUNK)):
                if stop():
                    raise AbandonedError(f"{path} is not wanted any more")
                if len(reads) == _BUFFERS:
                    digest_oldest()
                target = place(turn, start)
                length = min(size - start, CHUNK)
                reads.append((target, pool.submit(_read_at, descriptor, target, start, length, path, disk)))
            while reads:
                digest_oldest()
    finally:
        os.close(descriptor)
    return digester.result()


def _read_at(descriptor: int, target: Bytes, start: int, length: int, path: Path, disk: Disk) -> int:
    """Reads up to `length` bytes; less only at the end of the file."""
    done = 0
    while done < length:
        try:
            count = os.preadv(descriptor, [target[done : align_up(length)].data], start + done)
        except OSError as error:
            if error.errno not in _REFUSALS or not disk.to_buffered(descriptor, path):
                raise
            continue
        if count == 0:
            break
        done += count
    return min(done, length)
