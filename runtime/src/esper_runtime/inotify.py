"""Linux inotify for asyncio, by ctypes: told about file changes at once, without polling and without a thread."""

import asyncio
import contextlib
import ctypes
import os
import struct
from collections.abc import AsyncGenerator
from enum import IntFlag
from pathlib import Path
from typing import Final, NamedTuple


class Change(IntFlag):
    """Bits of inotify(7)."""

    MODIFY = 0x2
    ATTRIB = 0x4
    CLOSE_WRITE = 0x8
    MOVED_FROM = 0x40
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE = 0x200
    DELETE_SELF = 0x400
    MOVE_SELF = 0x800
    OVERFLOW = 0x4000
    """The kernel's queue was full and changes are missing: look at everything."""
    IGNORED = 0x8000
    """The watch is gone, because the watched directory is."""


class Event(NamedTuple):
    change: Change
    name: str
    """Of the entry in the watched directory; empty for the directory itself."""


_HEADER: Final = struct.Struct("iIII")
_READ_BYTES: Final = 64 * 1024


class Watch:
    """Changes in one directory. OSError when it does not exist or the user's inotify limits are reached.

        with Watch(directory, Change.MOVED_TO | Change.CREATE) as watch:
            while True:
                for event in await watch.changes(): ...

    What happens between two calls is kept by the kernel, so a change after the construction is never missed.
    """

    def __init__(self, directory: Path, mask: Change) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self._descriptor < 0:
            raise _error("inotify")
        if libc.inotify_add_watch(self._descriptor, os.fsencode(directory), ctypes.c_uint32(mask)) < 0:
            error = _error(str(directory))
            os.close(self._descriptor)
            raise error

    async def changes(self) -> list[Event]:
        """Waits for at least one change and takes in all there are."""
        while not (found := self.pending()):
            await self._readable()
        return found

    def pending(self) -> list[Event]:
        """The changes so far, without waiting."""
        found: list[Event] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found += _parse(os.read(self._descriptor, _READ_BYTES))
        return found

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable = loop.create_future()
        loop.add_reader(self._descriptor, _resolve, readable)
        try:
            await readable
        finally:
            loop.remove_reader(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def hints(directory: Path, mask: Change, *, every_s: float, poll_s: float) -> AsyncGenerator[OSError | None]:
    """Yields at once, then whenever something in the directory may have changed, and after `every_s` seconds anyway.

    While the directory cannot be watched (absent, or out of inotify instances) it yields the error every `poll_s`
    seconds instead, and goes back to watching as soon as that is possible.
    """
    while True:
        try:
            with Watch(directory, mask | Change.DELETE_SELF | Change.MOVE_SELF) as watch:
                yield None
                gone = False
                while not gone:
                    events: list[Event] = []
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(every_s):
                            events = await watch.changes()
                    gone = any(e.change & (Change.IGNORED | Change.DELETE_SELF | Change.MOVE_SELF) for e in events)
                    yield None
        except OSError as error:
            yield error
            await asyncio.sleep(poll_s)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _parse(chunk: bytes) -> list[Event]:
    events = []
    at = 0
    while at < len(chunk):
        _, mask, _, length = _HEADER.unpack_from(chunk, at)
        at += _HEADER.size
        events.append(Event(Change(mask & 0xFFFF), os.fsdecode(chunk[at : at + length].rstrip(b"\0"))))
        at += length
    return events


def _error(subject: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), subject)
