"""The runner's side of the guard process: starts it, tells it about pods, hears where Redis is."""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper_runtime.local.pod import LocalPod

_START_PATIENCE_S = 20.0
_STOP_PATIENCE_S = 10.0


class Guardian:
    """An async context manager around `python -m esper_runtime.local.guard`."""

    def __init__(
        self, scratch: list[Path], *, redis: dict[str, str] | None, log: Path, on_redis: Callable[[str | None], None]
    ) -> None:
        """`redis` holds the socket and the data directory, or None for a run without; `on_redis(problem)` hears
        that Redis is up (None) or why it is not."""
        self._settings = {"scratch": [str(path) for path in scratch], "redis": redis}
        self._log = log
        self._on_redis = on_redis
        self._redis_known = asyncio.Event()
        self._told: dict[str, Any] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Guardian":
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "esper_runtime.local.guard",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._send(self._settings)
        self._listening = asyncio.create_task(self._listen())
        if self._settings["redis"] is not None:
            async with asyncio.timeout(_START_PATIENCE_S):
                await self._redis_known.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._send({"bye": True})
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_PATIENCE_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._listening is not None:
            await self._listening

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

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            message = json.loads(line)
            if message["redis"] is not None:
                self._on_redis(None)
            else:
                self._on_redis(message.get("error", "it does not answer"))
            self._redis_known.set()
        self._redis_known.set()
