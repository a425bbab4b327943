"""The spare trainer: a process that has imported torch and the user's module, ready before it is needed.

One at most. It is made once training runs, at half speed so that training hardly notices, watched, made again after
use, and given up when memory is tight or when it cannot be made. Why a waiting process and not a parent that forks:
user modules may start threads or ask for CUDA devices when imported, which a fork does not survive; a spare is the
very process that a cold start would have been. Why stopped half the time and not a low priority: a process without
privileges cannot raise its priority again.
"""

import json
import logging
import math
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

from esper_runtime.tolaria.supervisor import child
from esper_runtime.tolaria.supervisor.room import Room

SETTLE_S = 3.0
"""Of training, before a spare is begun: a run that ends sooner needs none."""
RUN_S = REST_S = 0.05
WARM_LIMIT_S = 300.0
"""A spare that is not ready by then hangs."""
TAKEN_LIMIT_S = 60.0
"""The same at full speed, for one that was needed before it was ready."""
FAILURE_LIMIT = 3
"""Failures in a row after which no spare is tried any more."""
BACKOFF_S = 10.0
SHORTAGE_BACKOFF_S = 60.0
RESERVE_SHARE = 0.05
"""Of the container's memory: with less left, the spare goes."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparePolicy:
    """Whether a spare is due. Pure: told the time and the room; each event gives the policy that follows."""

    strategy_allows: bool = True
    failures: int = 0
    not_before_s: float = -math.inf
    need: int | None = None
    """Bytes that a ready spare had for itself."""

    @property
    def given_up(self) -> bool:
        return not self.strategy_allows or self.failures >= FAILURE_LIMIT

    def due(self, *, now_s: float, trained_s: float | None) -> bool:
        """`trained_s`: since the trainer's first step; None before it."""
        settled = trained_s is not None and trained_s >= SETTLE_S
        return settled and not self.given_up and now_s >= self.not_before_s

    def shortage(self, room: Room | None, *, trainer_bytes: int | None) -> str:
        """Why there is no room to begin one, or nothing. What it needs is at most what the trainer has."""
        need = self.need if self.need is not None else trainer_bytes
        if room is None or need is None or room.left >= need + RESERVE_SHARE * room.limit:
            return ""
        return f"{room.left >> 20} MiB of memory are left, and it may need {need >> 20} MiB"

    def tight(self, room: Room | None) -> bool:
        """Whether the spare that is there has to make room."""
        return room is not None and room.left < RESERVE_SHARE * room.limit

    def ready(self, need: int | None) -> "SparePolicy":
        return replace(self, failures=0, need=need if need is not None else self.need)

    def failed(self, *, now_s: float) -> "SparePolicy":
        return replace(self, failures=self.failures + 1, not_before_s=now_s + BACKOFF_S * 2**self.failures)

    def short(self, *, now_s: float) -> "SparePolicy":
        return replace(self, not_before_s=now_s + SHORTAGE_BACKOFF_S)


@dataclass(kw_only=True, slots=True)
class _Process:
    pid: int
    socket: socket.socket
    began_s: float
    ready: bool = False
    resting: bool = False
    turn_at_s: float = field(default=math.inf)
    """When to stop it or let it run again; infinite once it is ready."""


class Spares:
    """Makes, paces, hands over and gives up the spare. Registers its socket with the selector, itself as data."""

    def __init__(
        self,
        *,
        module: str,
        policy: SparePolicy,
        selector: selectors.BaseSelector,
        measure: Callable[[], Room | None],
        private_bytes: Callable[[int], int | None],
        tell: Callable[[str], None],
    ) -> None:
        """`tell` is for people, once for each kind of trouble."""
        self._module = module
        self._policy = policy
        self._selector = selector
        self._measure = measure
        self._private_bytes = private_bytes
        self._tell = tell
        self._told: set[str] = set()
        self._process: _Process | None = None
        self._taken: _Process | None = None
        self.starts = 0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def ready(self) -> bool:
        return self._process is not None and self._process.ready

    @property
    def deadline_s(self) -> float:
        """When to call tend() at the latest."""
        return math.inf if self._process is None else self._process.turn_at_s

    def tend(self, *, now_s: float, trained_s: float | None, trainer: int | None, environ: Mapping[str, str]) -> None:
        """Makes one when it is due, and looks after the one that is there. `environ` is that of a new process."""
        process = self._process
        if process is None:
            if self._taken is None and trainer is not None and self._policy.due(now_s=now_s, trained_s=trained_s):
                self._begin(now_s, trainer, environ)
            return
        if self._policy.tight(self._measure()):
            self._policy = self._policy.short(now_s=now_s)
            self.discard()
            self._say("memory", "memory is tight")
        elif not process.ready and now_s - process.began_s > WARM_LIMIT_S:
            self._fail(now_s, f"it is not ready after {WARM_LIMIT_S:.0f} s: an import hangs")
        elif now_s >= process.turn_at_s:
            self._turn(process, now_s)

    def _begin(self, now_s: float, trainer: int, environ: Mapping[str, str]) -> None:
        shortage = self._policy.shortage(self._measure(), trainer_bytes=self._private_bytes(trainer))
        if shortage:
            self._policy = self._policy.short(now_s=now_s)
            self._say("memory", shortage)
            return
        try:
            self._process = self._spawned(now_s, environ)
        except OSError as error:
            # Processes, descriptors or memory of the system are used up, which may pass: no fault of the spare's own.
            self._policy = self._policy.short(now_s=now_s)
            self._say("start", f"it cannot be started: {error}")
            return
        self.starts += 1
        log.info("spare begun", extra={"spare_pid": self._process.pid})

    def _spawned(self, now_s: float, environ: Mapping[str, str]) -> _Process:
        """A new one, its socket registered. OSError leaves nothing behind."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, ExitStack() as undo:
            undo.callback(ours.close)
            ours.setblocking(False)
            self._selector.register(ours, selectors.EVENT_READ, self)
            undo.callback(self._selector.unregister, ours)
            os.set_inheritable(theirs.fileno(), True)
            pid = spawn(self._module, environ, str(theirs.fileno()))
            undo.pop_all()
        return _Process(pid=pid, socket=ours, began_s=now_s, turn_at_s=now_s + RUN_S)

    def _turn(self, process: _Process, now_s: float) -> None:
        process.resting = not process.resting
        process.turn_at_s = now_s + (REST_S if process.resting else RUN_S)
        _signal_group(process.pid, signal.SIGSTOP if process.resting else signal.SIGCONT)

    def readable(self, *, now_s: float) -> None:
        """Takes what the spare says: that it is ready, or why it will never be. Its end is not news from here."""
        process = self._process or self._taken
        assert process is not None
        try:
            said = process.socket.recv(child.MAX_WORD_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            log.info("spare's connection broke: %s", error)
            said = b""
        if process is self._taken:
            self._close(process)
            self._taken = None
            return
        if not said:
            self._selector.unregister(process.socket)  # it is dying: died() follows
            return
        word = json.loads(said)
        if child.FAILED in word:
            self._fail(now_s, str(word[child.FAILED]))
            return
        if process.resting:
            self._turn(process, now_s)
        process.ready, process.turn_at_s = True, math.inf
        self._policy = self._policy.ready(self._private_bytes(process.pid))
        log.info("spare ready after %.1f s", now_s - process.began_s, extra={"spare_pid": process.pid})

    def take(self, environ: Mapping[str, str], *, now_s: float) -> int | None:
        """Makes the spare the trainer and gives its PID; None when there is none to take."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            process.socket.send(json.dumps(dict(environ)).encode())
        except OSError as error:
            log.warning("spare cannot be used: %s", error)
            self._process = process
            self.discard()
            return None
        _signal_group(process.pid, signal.SIGCONT)
        if process.ready:
            self._close(process)
        else:
            process.began_s = now_s
            self._taken = process
        return process.pid

    def overdue(self, *, now_s: float) -> int | None:
        """PID of a spare that was taken before it was ready and hangs in its imports. Told once."""
        taken = self._taken
        if taken is None or now_s - taken.began_s <= TAKEN_LIMIT_S:
            return None
        self._close(taken)
        self._taken = None
        self._policy = self._policy.failed(now_s=now_s)
        self._say("import", f"it was not ready after {TAKEN_LIMIT_S:.0f} s: an import hangs")
        return taken.pid

    def died(self, pid: int, status: int, *, now_s: float) -> None:
        """A child was reaped. Nothing happens when it was not the spare."""
        if self._taken is not None and pid == self._taken.pid:
            self._close(self._taken)
            self._taken = None
        if self._process is None or pid != self._process.pid:
            return
        process, self._process = self._process, None
        self._close(process)
        _signal_group(pid, signal.SIGKILL)
        self._policy = self._policy.failed(now_s=now_s)
        log.warning("spare ended with %d", status)
        if self._policy.given_up:
            self._say("import", f"it ended {FAILURE_LIMIT} times in a row, with {status} at last")

    def discard(self) -> None:
        """Ends the spare, if there is one; it is reaped like any child."""
        process, self._process = self._process, None
        if process is not None:
            self._close(process)
            _signal_group(process.pid, signal.SIGKILL)

    def retire(self) -> None:
        """Ends the spare for good: the container is going to end."""
        self._policy = replace(self._policy, strategy_allows=False)
        self.discard()

    def _fail(self, now_s: float, why: str) -> None:
        self._policy = self._policy.failed(now_s=now_s)
        self.discard()
        self._say("import", why)

    def _close(self, process: _Process) -> None:
        with suppress(KeyError):  # its end was heard already
            self._selector.unregister(process.socket)
        process.socket.close()

    def _say(self, kind: str, why: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._tell(f"no spare trainer, so a restart will take as long as a start: {why}")


_SIGNALS_OF_OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE)


def spawn(module: str, environ: Mapping[str, str], *arguments: str) -> int:
    """Starts a trainer process, a spare when told its descriptor, as the leader of its own group. OSError."""
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", child.__name__, module, *arguments],
        dict(environ),
        setpgroup=0,
        setsigdef=[*_SIGNALS_OF_OURS],
    )


def _signal_group(leader: int, number: signal.Signals) -> None:
    """Nothing left to signal is no error."""
    with suppress(ProcessLookupError):
        os.killpg(leader, number)
