"""The supervisor's connection on weatherlight.sock: its end without a good-bye is the death of the container."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from esper_runtime.sidecar.http import write_atomically
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.recorder import Recorder

GOODBYE: Final = b"x"
POKE: Final = b"e"
GOODBYE_FILE: Final = "goodbye"
_HELLO_BYTES: Final = 256
_HELLO_S: Final = 2.0

log = logging.getLogger(__name__)


class SupervisorLink:
    """Serves one supervisor; a newer connection takes the place of an older one."""

    def __init__(
        self,
        path: Path,
        state_dir: Path,
        recorder: Recorder,
        metrics: Metrics,
        *,
        drain: Callable[[], Awaitable[None]],
    ) -> None:
        """`drain` brings in what the journal still holds: the supervisor's last events precede its end."""
        self._path = path
        self._goodbye_path = state_dir / GOODBYE_FILE
        self._recorder = recorder
        self._metrics = metrics
        self._drain = drain
        self._current: asyncio.StreamWriter | None = None

    async def run(self) -> None:
        """Endless. When it is cancelled, or fails, the connection closes, and nobody counts as dead for that."""
        self._path.unlink(missing_ok=True)  # left behind by an earlier worker
        try:
            async with asyncio.TaskGroup() as connections:

                def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    connections.create_task(self._serve(reader, writer))

                server = await asyncio.start_unix_server(accept, self._path, limit=_HELLO_BYTES)
                try:
                    await asyncio.Event().wait()
                finally:
                    server.close()  # and not waited for: its connections end with their tasks, after this
        finally:
            self._current = None
            self._metrics.supervisor_connected.set(0)

    @property
    def connected(self) -> bool:
        return self._current is not None

    def said_goodbye(self, incarnation: int) -> bool:
        """True when this incarnation announced its clean end, also to an earlier worker."""
        try:
            return self._goodbye_path.read_text() == f"{incarnation}\n"
        except FileNotFoundError:
            return False

    def poke(self) -> None:
        """Tells the supervisor to look at the emergency page. Never waits."""
        if self._current is not None:
            self._current.write(POKE)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            incarnation = await _hello(reader)
            if incarnation is None:
                log.warning("a connection on %s did not say who it is and was closed", self._path)
                return
            self._connect(writer, incarnation)
            clean = await self._listen(reader, incarnation)
            if self._current is writer:
                await self._ended(incarnation, clean=clean)
        finally:
            writer.close()

    def _connect(self, writer: asyncio.StreamWriter, incarnation: int) -> None:
        if self._current is not None:
            self._current.close()
        self._current = writer
        self._metrics.supervisor_connected.set(1)
        self._recorder.returned(incarnation)
        self.poke()  # a signal may have come while nobody listened
        log.info("supervisor connected", extra={"incarnation": incarnation})

    async def _listen(self, reader: asyncio.StreamReader, incarnation: int) -> bool:
        clean = False
        with contextlib.suppress(ConnectionError):
            while received := await reader.read(_HELLO_BYTES):
                if GOODBYE in received:
                    clean = True
                    write_atomically(self._goodbye_path, f"{incarnation}\n".encode())
        return clean

    async def _ended(self, incarnation: int, *, clean: bool) -> None:
        self._current = None
        self._metrics.supervisor_connected.set(0)
        await self._drain()
        # Another supervisor may have connected during the drain: then the container of this one is gone anyway.
        if not clean and incarnation >= self._recorder.reporter.incarnation:
            log.error("container tolaria died", extra={"incarnation": incarnation})
            self._recorder.died()


async def _hello(reader: asyncio.StreamReader) -> int | None:
    """The incarnation in `tolaria <rank> <incarnation>`; None when the line is no such thing."""
    try:
        async with asyncio.timeout(_HELLO_S):
            words = (await reader.readuntil(b"\n")).decode("ascii").split()
        container, _rank, incarnation = words[0], int(words[1]), int(words[2])
    except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        return None
    except (ValueError, IndexError):
        return None
    return incarnation if container == "tolaria" and incarnation > 0 else None
