"""The frame of a sidecar's worker process: event loop, stop on SIGTERM, exit codes."""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from esper_leyline.exitcodes import SidecarExit
from esper_leyline.paths import UMASK
from prometheus_client import disable_created_metrics

from esper_runtime.sidecar import logs
from esper_runtime.sidecar.environment import Environment, SettingsError
from esper_runtime.sidecar.init import PARENT_PID
from esper_runtime.sidecar.process import terminate_with_parent
from esper_runtime.sidecar.supervision import CrashLoop

log = logging.getLogger(__name__)

Serve = Callable[[Environment, asyncio.Event], Awaitable[None]]
"""Serves until the event is set, then cleans up and returns."""


def run_worker(name: str, serve: Serve) -> int:
    """Runs `serve` to its end and gives the exit code: 0, that of a SettingsError, or 70 after a CrashLoop. Other
    errors end the process with a traceback; PID 1 starts the next one."""
    os.umask(UMASK)
    logs.configure(name, os.environ)
    # Else every counter and histogram has a second series, which nobody reads.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    parent = os.environ.get(PARENT_PID)
    if parent is not None and not terminate_with_parent(int(parent)):
        log.error("PID 1 of this sidecar ended before its worker was up")
        return 1
    try:
        asyncio.run(_serve(serve))
    except SettingsError as error:
        log.error("%s", error)
        return error.exit_code
    except CrashLoop as error:
        log.critical("%s; this container ends", error)
        return SidecarExit.CRASH_LOOP
    return SidecarExit.STOPPED


async def until_stopped(stop: asyncio.Event, *parts: Coroutine[Any, Any, None]) -> None:
    """Runs endless parts beside the servers until `stop`; an error in one of them ends the worker."""
    stopping = asyncio.create_task(stop.wait())
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (stopping, *tasks):
            task.cancel()
        await asyncio.gather(stopping, *tasks, return_exceptions=True)


async def _serve(serve: Serve) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    await serve(Environment(os.environ), stop)
