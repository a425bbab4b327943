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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
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
_WRITERS = 2
_READ_CHUNK = 2 * 1024 * 1024
"""Smaller: of reads under way together the disk finishes none early, and digests wait for the first."""
_READS = 6
_READERS = 3
"""Fresh memory is zeroed by the thread that reads into it; two others keep the disk busy meanwhile."""
_HUGE_PAGE = 2 * 1024 * 1024
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

    def to_buffered(self, descriptor: int, path: Path) -> None:
        """Switches an open file to buffered I/O after a refusal, if no other thread has done so."""
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._give_up(path)

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
    return _round_up(size, ALIGN)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def aligned_buffer(size: int) -> Bytes:
    """Fresh zeroed memory of at least `size` bytes, page-aligned, in huge pages where there are any."""
    # Whole huge pages, else the kernel places it where its ends have none, and the disk is slower into small ones.
    length = align_up(size) if size < _HUGE_PAGE // 4 else _round_up(size, _HUGE_PAGE)
    # Private: shared anonymous memory is a file to the kernel, which gets no huge pages.
    region = mmap.mmap(-1, max(length, ALIGN), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
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

    with _workers(size, _WRITERS) as pool:
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
    with _workers(size, _WRITERS) as pool:
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
        try:
            future.set_result(run(*args, **kwargs))
        except OSError as error:
            future.set_exception(error)
        return future


def _workers(size: int, count: int) -> Executor:
    return _Here() if size <= CHUNK else ThreadPoolExecutor(count, thread_name_prefix="checkpoint-io")


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
    done, refused = 0, False
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:].data, offset + done)
        except OSError as error:
            if error.errno not in _REFUSALS or refused:
                raise
            disk.to_buffered(descriptor, path)
            refused = True


def go_on() -> bool:
    """A Stop that never stops."""
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file to read: its first `size` bytes, into `memory` (from aligned_buffer) where they are to be kept."""

    path: Path
    size: int
    memory: Bytes | None = None


def digest_file(path: Path, *, size: int, disk: Disk, stop: Stop = go_on) -> FileDigest:
    """The digest of one file, as digest_files gives it, without keeping what was read."""
    with closing(digest_files([Source(path=path, size=size)], disk=disk, stop=stop)) as digests:
        return next(digests)


def digest_files(sources: Sequence[Source], *, disk: Disk, stop: Stop = go_on) -> Generator[FileDigest, None, None]:
    """Reads files and gives the digest of each, in order; the next ones are being read meanwhile.

    A shorter file gives a digest of what is there; the caller compares. An OSError is that of the file whose digest
    is due. Whoever does not ask for the last digest closes this: after that nothing is read any more.
    """
    reads = _Reads(sources, disk)
    try:
        for file in reads.files:
            for start in range(0, max(file.source.size, 1), _READ_CHUNK):
                if reads.full:
                    yield from reads.digest_oldest()
                if stop():
                    raise AbandonedError(f"{file.source.path} is not wanted any more")
                reads.begin(file, start)
        while reads.under_way:
            yield from reads.digest_oldest()
    finally:
        reads.close()


class _Reading:
    """One file while it is read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.digester = Digester()
        self.descriptor: int | None = None

    def opened(self, disk: Disk) -> int:
        if self.descriptor is None:
            size = self.source.size
            self.descriptor = disk.open(self.source.path, os.O_RDONLY, direct=size >= _DIRECT_MIN_BYTES)
            # After a buffered write the pages in memory would verify themselves, not the disk.
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return self.descriptor

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A part of a file on its way into `target`."""

    file: _Reading
    last: bool
    target: Bytes
    count: Future[int]


class _Reads:
    """The chunks of several files on their way from the disk, at most _READS at once, whatever file they are of."""

    def __init__(self, sources: Sequence[Source], disk: Disk) -> None:
        self.files = [_Reading(source) for source in sources]
        self.under_way: deque[_Chunk] = deque()
        self._disk = disk
        self._begun = 0
        self._passing = self._buffers()
        self._pool = _workers(sum(source.size for source in sources), _READERS)

    def _buffers(self) -> list[Bytes]:
        """For chunks that are kept nowhere."""
        sizes = [min(file.source.size, _READ_CHUNK) for file in self.files if file.source.memory is None]
        return [aligned_buffer(max(sizes)) for _ in range(_READS)] if sizes else []

    @property
    def full(self) -> bool:
        return len(self.under_way) == _READS

    def begin(self, file: _Reading, start: int) -> None:
        source = file.source
        length = min(source.size - start, _READ_CHUNK)
        if source.memory is None:
            target = self._passing[self._begun % _READS]  # that of a chunk which is digested
        else:
            target = source.memory[start : start + align_up(length)]
        self._begun += 1
        try:
            descriptor = file.opened(self._disk)
        except OSError as error:
            count: Future[int] = Future()
            count.set_exception(error)  # its turn comes once the files before it are digested
        else:
            count = self._pool.submit(_read_at, descriptor, target, start, length, source.path, self._disk)
        self.under_way.append(_Chunk(file, start + length == source.size, target, count))

    def digest_oldest(self) -> Iterator[FileDigest]:
        """Waits for it. Gives the file's digest after its last chunk."""
        chunk = self.under_way[0]
        count = chunk.count.result()
        self.under_way.popleft()
        chunk.file.digester.update(chunk.target[:count])
        if chunk.last:
            chunk.file.close()  # a state of many files must not hold them all open
            yield chunk.file.digester.result()

    def close(self) -> None:
        """After it nobody writes into the memory of any source. Where all was digested there is nobody to wait for."""
        self._pool.shutdown(wait=bool(self.under_way), cancel_futures=True)
        for file in self.files:
            file.close()


def _read_at(descriptor: int, target: Bytes, start: int, length: int, path: Path, disk: Disk) -> int:
    """Reads up to `length` bytes; less only at the end of the file."""
    done, refused = 0, False
    while done < length:
        try:
            count = os.preadv(descriptor, [target[done : align_up(length)].data], start + done)
        except OSError as error:
            if error.errno not in _REFUSALS or refused:
                raise
            disk.to_buffered(descriptor, path)
            refused = True
            continue
        if count == 0:
            break
        done += count
    return min(done, length)
