"""The runner's side of the guard process: keeps one alive, tells it about pods, hears where Redis is."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper_runtime.local.errors import LocalError
from esper_runtime.local.guard import MARK
from esper_runtime.local.pod import LocalPod

RESTART_AFTER_S = 1.0
_START_PATIENCE_S = 60.0
_STOP_PATIENCE_S = 10.0
DIED = "the process that guards this run died; another one starts"


class Guardian:
    """An async context manager around `python -m esper_runtime.local.guard`."""

    def __init__(
        self, scratch: list[Path], *, redis: dict[str, str] | None, log: Path, on_redis: Callable[[str | None], None]
    ) -> None:
        """`redis` holds the socket and the data directory, or None for a run without; `on_redis(problem)` hears
        that Redis is up (None) or why it is not."""
        self._mark = str(scratch[0])
        self._settings = {"scratch": [str(path) for path in scratch], "redis": redis}
        self._log = log
        self._on_redis = on_redis
        self._redis_known = asyncio.Event()
        self._told: dict[str, dict[str, Any]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._tending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Guardian":
        await self._start()
        self._tending = asyncio.create_task(self._tend())
        if self._settings["redis"] is not None:
            try:
                await asyncio.wait_for(self._redis_known.wait(), _START_PATIENCE_S)
            except TimeoutError:
                await self.__aexit__()
                raise LocalError(
                    f"Valkey did not start within {_START_PATIENCE_S:.0f} s (see {self._log}): try again, or run "
                    "without it with --no-redis"
                ) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        if self._tending is not None:
            self._tending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._tending
        self._send({"bye": True})
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_PATIENCE_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def follow(self, pod: LocalPod) -> None:
        """The pod's processes as they are now."""
        message = {"pod": pod.uid, "leaders": pod.leaders, "grace": pod.grace_s}
        if self._told.get(pod.uid) != message:
            self._told[pod.uid] = message
            self._send(message)

    def forget(self, pod: LocalPod) -> None:
        """The pod is gone."""
        if self._told.pop(pod.uid, None) is not None:
            self._send({"gone": pod.uid})

    async def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "esper_runtime.local.guard",
                env={**os.environ, MARK: self._mark},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._send(self._settings)
        for message in self._told.values():
            self._send(message)

    async def _tend(self) -> None:
        """Hears the guard; one that dies is replaced, and told everything again."""
        while True:
            assert self._process is not None
            await self._listen(self._process)
            await self._process.wait()
            self._on_redis(DIED)
            await asyncio.sleep(RESTART_AFTER_S)
            await self._start()

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            message = json.loads(line)
            up = message["redis"] is not None
            self._on_redis(None if up else message.get("error", "it does not answer"))
            self._redis_known.set()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
