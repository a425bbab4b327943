"""PID 1 of a sidecar container: starts the worker, restarts it, passes signals on, reaps orphans.

The kubelet brings a dead container back after 2 s at first and after most of a minute later on; this process does it
at once. It imports nothing but the standard library, so that it has next to nothing to fail on, and it holds no
state: whatever must outlive the worker lies in files.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final

from esper_leyline.exitcodes import SidecarExit
from esper_leyline.paths import UMASK

from esper_runtime.sidecar import logs
from esper_runtime.sidecar.process import adopt_orphans

RESTARTS: Final = "ESPER_SIDECAR_RESTARTS"
"""Set for the worker: how many workers ended before it."""
PARENT_PID: Final = "ESPER_SIDECAR_PARENT"
"""Set for the worker: the PID whose end ends the worker too. Absent: the worker was started by hand."""

HEALTHY_AFTER_S: Final = 10.0
"""A worker that lived this long starts over with an immediate restart."""
FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 5.0

_WATCHED: Final = frozenset({signal.SIGCHLD, signal.SIGTERM, signal.SIGINT})
_STOPS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_HELD_FOR_WORKER: Final = (signal.SIGTERM, signal.SIGINT)
"""Stay blocked until the worker has its handlers, so that a stop during its start is never lost."""

_FINAL: Final = frozenset(SidecarExit) - {SidecarExit.STOPPED}

log = logging.getLogger(__name__)


def run_sidecar(name: str, *, worker: str, stop_timeout_s: float = 10.0) -> int:
    """Runs `python -m <worker>` until SIGTERM or SIGINT; the result is this process's exit code.

    0 when the worker stopped cleanly on request; the worker's own when it is one of SidecarExit, which say that no
    restart from here would help; 137 when it had to be killed `stop_timeout_s` seconds after the request.
    """
    os.umask(UMASK)
    logs.configure(name, os.environ)
    adopt_orphans()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    try:
        return _Init([sys.executable, "-m", worker], os.environ, stop_timeout_s=stop_timeout_s).run()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def restart_delay_s(quick_deaths: int) -> float:
    """Pause before the next start after so many deaths in a row of workers younger than HEALTHY_AFTER_S."""
    if quick_deaths <= 1:
        return 0.0
    return float(min(FIRST_BACKOFF_S * 2 ** min(quick_deaths - 2, 16), MAX_BACKOFF_S))


class _Init:
    """The supervision of one worker. Signals are blocked and taken one at a time, so nothing here is re-entrant."""

    def __init__(
        self,
        command: list[str],
        environ: Mapping[str, str],
        *,
        stop_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = command
        self._environ = {**environ, PARENT_PID: str(os.getpid())}
        self._stop_timeout_s = stop_timeout_s
        self._clock = clock
        self._worker: int | None = None
        self._started_at = 0.0
        self._start_at: float | None = clock()
        """When to start the next worker; None while one lives."""
        self._kill_at: float | None = None
        """Set once a stop was asked for."""
        self._quick_deaths = 0
        self._restarts = 0

    def run(self) -> int:
        while True:
            now = self._clock()
            if self._start_at is not None and now >= self._start_at:
                self._start()
            if self._kill_at is not None and now >= self._kill_at and self._worker is not None:
                log.warning("worker did not stop in %.0f s and is killed", self._stop_timeout_s)
                os.kill(self._worker, signal.SIGKILL)
                self._kill_at = float("inf")
            received = signal.sigtimedwait(_WATCHED, self._wait_s())
            if received is not None and received.si_signo in _STOPS:
                self._stop()
            result = self._reap()
            if result is not None:
                return result
            if self._kill_at is not None and self._worker is None:
                return SidecarExit.STOPPED

    def _wait_s(self) -> float:
        due = [at for at in (self._start_at, self._kill_at) if at is not None]
        # An hour stands for "no deadline": sigtimedwait takes no infinity.
        return min([3600.0, *(max(0.0, at - self._clock()) for at in due)])

    def _start(self) -> None:
        self._start_at = None
        self._started_at = self._clock()
        self._worker = os.posix_spawn(
            self._command[0],
            self._command,
            {**self._environ, RESTARTS: str(self._restarts)},
            setsigmask=_HELD_FOR_WORKER,
            setsigdef=sorted(_WATCHED),
        )
        log.info("worker started", extra={"worker_pid": self._worker})

    def _stop(self) -> None:
        self._start_at = None
        if self._kill_at is None:
            self._kill_at = self._clock() + self._stop_timeout_s
        if self._worker is not None:
            os.kill(self._worker, signal.SIGTERM)

    def _reap(self) -> int | None:
        """Takes in every dead child; a number ends this process."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid == 0:
                return None
            if pid == self._worker:
                result = self._worker_ended(os.waitstatus_to_exitcode(status))
                if result is not None:
                    return result

    def _worker_ended(self, code: int) -> int | None:
        self._worker = None
        meaning = code if code >= 0 else 128 - code
        if self._kill_at is not None:
            return meaning
        if meaning in _FINAL:
            log.error("worker ended with %d (%s): no restart from here would help", meaning, SidecarExit(meaning).name)
            return meaning
        self._restarts += 1
        lived_s = self._clock() - self._started_at
        self._quick_deaths = 1 if lived_s >= HEALTHY_AFTER_S else self._quick_deaths + 1
        delay_s = restart_delay_s(self._quick_deaths)
        self._start_at = self._clock() + delay_s
        log.warning(
            "worker ended with %d after %.1f s; restart in %.1f s",
            meaning,
            lived_s,
            delay_s,
            extra={"exit_code": meaning, "quick_deaths": self._quick_deaths},
        )
        return None
