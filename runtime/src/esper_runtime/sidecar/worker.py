"""The frame of a sidecar's worker process: event loop, stop on SIGTERM, exit codes."""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable

from esper_leyline.exitcodes import ExitCode
from esper_leyline.paths import UMASK

from esper_runtime.sidecar import logs
from esper_runtime.sidecar.environment import Environment, SettingsError
from esper_runtime.sidecar.init import PARENT_PID
from esper_runtime.sidecar.process import terminate_with_parent

log = logging.getLogger(__name__)

Serve = Callable[[Environment, asyncio.Event], Awaitable[None]]
"""Serves until the event is set, then cleans up and returns."""


def run_worker(name: str, serve: Serve) -> int:
    """Runs `serve` to its end and gives the exit code: 0, or 78 after a SettingsError. Other errors end the process
    with a traceback; PID 1 starts the next one."""
    os.umask(UMASK)
    logs.configure(name, os.environ)
    parent = os.environ.get(PARENT_PID)
    if parent is not None and not terminate_with_parent(int(parent)):
        log.error("PID 1 of this sidecar ended before its worker was up")
        return 1
    try:
        asyncio.run(_serve(serve))
    except SettingsError as error:
        log.error("%s", error)
        return ExitCode.CONFIG
    return 0


async def _serve(serve: Serve) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    await serve(Environment(os.environ), stop)
