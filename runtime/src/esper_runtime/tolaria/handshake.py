"""The trainer's side of an epoch boundary: asks Kasmina and Tamiyo for a verified command, and never waits for them.

    boundary = Boundary(run_dir, run_uid=uid, attempt=attempt, restarted=trainer_start > 1)   # once; warms gRPC up
    result = boundary.exchange(packet)            # after validation; packet without packet_id; <= 12 ms, never raises
    for change in result.degradations: journal a RuntimeEvent(degradation=change)
    counters.rejected_commands += len(result.rejections)
    if result.command is not None: act on it      # verified; NO_OPERATION is a command too; None = train on

The calls run in a thread of their own, which stays, as do the channels while all goes well: a new one of either costs
page faults at every boundary. After any failure, and when another process listens at a socket, the next boundary has
new channels, so that a sidecar that came back is found without any back-off. Before a fork of this process the channels
are closed, for the child could not (unless an answer is late: see `idle`). After the soft deadline training goes on;
the answer, when it comes within the hard deadline, is used at the next boundary. While one is awaited no other is
asked. Who asks at all, the breakers decide; `collect` is for boundaries at which nobody may be asked.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from esper_leyline.labels import KASMINA, TAMIYO
from esper_leyline.paths import KASMINA_SOCKET, TAMIYO_SOCKET
from esper_leyline.reasons import CommandRejection, RunReason
from esper_leyline.v1.command_pb2 import AdaptationCommand, CommandType, OpenBoundaryRequest
from esper_leyline.v1.report_pb2 import Degradation
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from google.protobuf.message import DecodeError

from esper_runtime.tolaria import rpc

SOFT_DEADLINE_S: Final = 0.012
HARD_DEADLINE_S: Final = 2.0
PACKET_VERSION: Final = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Milliseconds. None: that part did not end while the trainer waited."""

    open_ms: float | None = None
    evaluate_ms: float | None = None
    submit_ms: float | None = None
    total_ms: float
    """How long the trainer was held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Silence:
    """A sidecar that was asked and gave no answer."""

    component: str
    timed_out: bool
    """It was waited for until the hard deadline."""
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryResult:
    """What one boundary brought."""

    command: AdaptationCommand | None
    """Verified by Kasmina, or None: train on."""
    late: bool
    """The command answers an earlier boundary, whose soft deadline it missed."""
    answered: bool
    """The sidecars had their say (a command, a rejection or a failure) within the soft deadline."""
    rejections: tuple[CommandRejection, ...]
    """Commands that were refused since the last result, by reason."""
    degradations: tuple[Degradation, ...]
    """Sidecars whose state changed since the last result."""
    heard: frozenset[str]
    """Sidecars that answered since the last result."""
    silent: tuple[Silence, ...]
    """Calls since the last result that brought no answer."""
    timings: Timings
    unasked: bool = False
    """There was no thread to ask in."""


class Boundary:
    """Talks to the sidecars of one pod, from one thread of the trainer."""

    def __init__(
        self,
        run_dir: Path,
        *,
        run_uid: str,
        attempt: int,
        restarted: bool = False,
        soft_deadline_s: float = SOFT_DEADLINE_S,
        hard_deadline_s: float = HARD_DEADLINE_S,
    ) -> None:
        """`restarted`: an earlier trainer may have reported a sidecar as degraded, so the first answer is a change."""
        self._sockets = {KASMINA: run_dir / KASMINA_SOCKET, TAMIYO: run_dir / TAMIYO_SOCKET}
        self._speaker = _Speaker(
            _Lines(rpc.Line(self._sockets[KASMINA], rpc.kasmina), rpc.Line(self._sockets[TAMIYO], rpc.tamiyo))
        )
        self._run_uid = run_uid
        self._attempt = attempt
        self._soft_deadline_s = soft_deadline_s
        self._hard_deadline_s = hard_deadline_s
        assumed = None if restarted else False
        self._degraded: dict[str, bool | None] = {KASMINA: assumed, TAMIYO: assumed}
        self._awaited: _Conversation | None = None
        self._newest: _Conversation | None = None
        rpc.warm_up(self._sockets[KASMINA])

    @property
    def idle(self) -> bool:
        """No conversation is going on, so that forking is safe."""
        return self._newest is None or self._newest.over

    @property
    def degraded(self) -> frozenset[str]:
        """Sidecars that did not answer when last asked."""
        return frozenset(name for name, degraded in self._degraded.items() if degraded)

    @property
    def awaiting(self) -> bool:
        """An answer is out, so the next exchange asks nobody."""
        return self._awaited is not None and not self._awaited.done.is_set()

    def signs_of_life(self) -> dict[str, tuple[int, int]]:
        """Identity of each sidecar's socket; another one than before means that a new process serves it."""
        return {name: rpc.listener_at(socket) for name, socket in self._sockets.items()}

    def exchange(self, packet: SystemStatePacket) -> BoundaryResult:
        """One boundary, held for the soft deadline at most. `packet` stays as it is; version, run and id are ours."""
        started = time.perf_counter()
        if self.awaiting:
            return self._result((), None, started)
        earlier = self._awaited
        asked = _Conversation(
            _addressed(packet, self._run_uid),
            self._speaker.lines,
            attempt=self._attempt,
            deadline_s=self._hard_deadline_s,
        )
        if not self._speaker.begin(asked):
            return replace(self.collect(), unasked=True)
        self._newest = asked
        asked.done.wait(self._soft_deadline_s - (time.perf_counter() - started))
        answered = asked.done.is_set()
        self._awaited = None if answered else asked
        ended = tuple(one for one in (earlier, asked if answered else None) if one is not None)
        return self._result(ended, asked, started)

    def collect(self) -> BoundaryResult:
        """A boundary at which nobody is asked: what came of an earlier one."""
        started = time.perf_counter()
        earlier = self._awaited
        if earlier is None or self.awaiting:
            return self._result((), None, started)
        self._awaited = None
        return self._result((earlier,), None, started)

    def close(self) -> None:
        """Gives up on an answer that is still awaited, and leaves no thread and no channel."""
        if self._awaited is not None:
            self._awaited.cancel()
            self._awaited = None
        self._speaker.end()

    def _result(
        self, ended: tuple["_Conversation", ...], asked: "_Conversation | None", started: float
    ) -> BoundaryResult:
        """`ended`: conversations whose outcome counts now, oldest first; `asked`: the one of this boundary."""
        degradations: list[Degradation] = []
        rejections: list[CommandRejection] = []
        chosen: tuple[AdaptationCommand, bool] | None = None
        for one in ended:
            outcome = one.outcome
            degradations += self._changes(outcome)
            rejection, command = _usable(one, outcome)
            if rejection is not None:
                rejections.append(rejection)
            # The newest word counts, but a late command that acts is not lost to a newer "nothing to do".
            if command is not None and (chosen is None or _acts(command) or not _acts(chosen[0])):
                chosen = command, one is not asked
        return BoundaryResult(
            command=chosen[0] if chosen else None,
            late=chosen[1] if chosen else False,
            answered=asked in ended,
            rejections=tuple(rejections),
            degradations=tuple(degradations),
            heard=frozenset().union(*(one.outcome.answered for one in ended)),
            silent=tuple(_silence(one.outcome) for one in ended if one.outcome.failed),
            timings=_timings(asked, started),
        )

    def _changes(self, outcome: "_Outcome") -> list[Degradation]:
        changes = []
        for component in (KASMINA, TAMIYO):
            degraded = component == outcome.failed
            if not degraded and component not in outcome.answered:
                continue  # not asked this time: nothing new is known of it
            if degraded != self._degraded[component]:
                message = outcome.message if degraded else f"{component} answers"
                changes.append(
                    Degradation(component=component, degraded=degraded, reason=RunReason.SIDECAR_DOWN, message=message)
                )
                self._degraded[component] = degraded
        return changes


@dataclass(slots=True)
class _Outcome:
    """How a conversation ended; written by its thread, read by the trainer once `done` is set."""

    command: AdaptationCommand | None = None
    rejection: CommandRejection | None = None
    failed: str = ""
    """The component that gave no answer."""
    message: str = ""
    timed_out: bool = False
    answered: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Lines:
    kasmina: rpc.Line
    tamiyo: rpc.Line

    def close(self) -> None:
        self.kasmina.close()
        self.tamiyo.close()


class _Thread:
    """Holds conversations, one after the other, until it is told None or one breaks."""

    def __init__(self) -> None:
        self.next: SimpleQueue[_Conversation | None] = SimpleQueue()
        self.busy = threading.Lock()
        self._broken = False
        # A daemon, so that an unanswered call does not keep a trainer that wants to end.
        self._thread = threading.Thread(target=self._run, name="boundary", daemon=True)
        self._thread.start()

    @property
    def usable(self) -> bool:
        """To be asked when no conversation goes on."""
        return self._thread.is_alive() and not self._broken

    def join(self) -> None:
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while (conversation := self.next.get()) is not None:
            self._broken = True  # if it does not end as it should: a mistake of our own, which must be seen
            try:
                with self.busy:
                    conversation.hold()
                self._broken = False
            finally:
                conversation.over = True
                conversation.done.set()


class _Speaker:
    """Sees to it that there is a thread for conversations, and that it ends with its owner."""

    def __init__(self, lines: _Lines) -> None:
        self.lines = lines
        self._thread: _Thread | None = None
        self._refused = False
        _speakers.add(self)

    def begin(self, conversation: "_Conversation") -> bool:
        """After the last one is done. False at a limit of threads; the next call tries again."""
        if self._thread is None or not self._thread.usable:
            try:
                self._thread = _Thread()
            except RuntimeError as error:
                self._refuse(error)
                return False
        self._refused = False
        self._thread.next.put(conversation)
        return True

    def _refuse(self, error: RuntimeError) -> None:
        if not self._refused:
            log.warning("no thread to ask Tamiyo in, training goes on without its word: %s", error)
        self._thread, self._refused = None, True

    def end(self) -> None:
        """The next conversation has a new thread."""
        thread, self._thread = self._thread, None
        self.lines.close()
        if thread is not None:
            thread.next.put(None)
            thread.join()

    def hang_up(self) -> None:
        """Closes the lines, unless they are in use."""
        thread = self._thread
        if thread is not None and thread.busy.acquire(blocking=False):
            self.lines.close()
            thread.busy.release()

    def __del__(self) -> None:
        if self._thread is not None:
            self._thread.next.put(None)


class _Conversation:
    """OpenBoundary, Evaluate, SubmitCommand, one after the other."""

    def __init__(self, packet: SystemStatePacket, lines: _Lines, *, attempt: int, deadline_s: float) -> None:
        self.done = threading.Event()
        self.over = False
        """Nothing of it goes on any more."""
        self.outcome = _Outcome()
        self.took_ms: dict[str, float] = {}
        self.started = time.monotonic()
        self._packet = packet
        self._lines = lines
        self._attempt = attempt
        self._deadline = self.started + deadline_s
        self._cancelled = False

    def cancel(self) -> None:
        """Ends the calls at once."""
        self._cancelled = True
        self._lines.close()

    def hold(self) -> None:
        sound = False
        try:
            sound = self._asked()
        finally:
            if not sound:
                self._lines.close()

    def _asked(self) -> bool:
        """Whether the lines are as good as before."""
        component = KASMINA
        try:
            kasmina = self._opened(self._lines.kasmina)
            packet = self._packet
            opening = OpenBoundaryRequest(
                run_uid=packet.training_run_id,
                attempt=self._attempt,
                epoch=packet.current_epoch,
                step=packet.global_step,
            )
            packet.packet_id = self._call("open", kasmina.OpenBoundary, opening).packet_id
            self.outcome.answered.add(KASMINA)
            component = TAMIYO
            tamiyo = self._opened(self._lines.tamiyo)
            signed = self._call("evaluate", tamiyo.Evaluate, packet)
            self.outcome.answered.add(TAMIYO)
            component = KASMINA
            verdict = self._call("submit", kasmina.SubmitCommand, signed)
            self._take(verdict.accepted, verdict.reason, signed.command)
        except rpc.RpcError as error:
            self.outcome.answered.discard(component)
            self.outcome.failed = component
            self.outcome.message = rpc.explained(component, error)
            self.outcome.timed_out = rpc.timed_out(error)
            return False
        except ValueError:
            # grpc's word for a call on a closed channel. Anything else is our own mistake and must be seen.
            if not self._cancelled:
                raise
            return False
        return True

    def _opened(self, line: rpc.Line) -> Any:
        stub = line.open()
        if self._cancelled:
            line.close()
        return stub

    def _call(self, part: str, method: Callable[..., Any], request: Any) -> Any:
        started = time.perf_counter()
        answer = method(request, timeout=max(0.001, self._deadline - time.monotonic()))
        self.took_ms[part] = (time.perf_counter() - started) * 1000.0
        return answer

    def _take(self, accepted: bool, reason: str, raw: bytes) -> None:
        if not accepted:
            known = reason in set(CommandRejection)
            self.outcome.rejection = CommandRejection(reason) if known else CommandRejection.MALFORMED
            return
        try:
            self.outcome.command = AdaptationCommand.FromString(raw)
        except DecodeError:
            self.outcome.rejection = CommandRejection.MALFORMED


_speakers: "weakref.WeakSet[_Speaker]" = weakref.WeakSet()


def _hang_up() -> None:
    for speaker in tuple(_speakers):
        speaker.hang_up()


os.register_at_fork(before=_hang_up)


def _addressed(packet: SystemStatePacket, run_uid: str) -> SystemStatePacket:
    copy = SystemStatePacket()
    copy.CopyFrom(packet)
    copy.version = PACKET_VERSION
    copy.training_run_id = run_uid
    return copy


def _usable(conversation: _Conversation, outcome: _Outcome) -> tuple[CommandRejection | None, AdaptationCommand | None]:
    """A command counts only within its own execution deadline, when it names one. The time runs from when we asked,
    by our own clock: that is before it was issued, and the issuer's clock need not agree with ours."""
    command = outcome.command
    if command is None or not command.execution_deadline_ms:
        return outcome.rejection, command
    age_ms = (time.monotonic() - conversation.started) * 1000.0
    return (None, command) if age_ms <= command.execution_deadline_ms else (CommandRejection.EXPIRED, None)


def _silence(outcome: _Outcome) -> Silence:
    return Silence(component=outcome.failed, timed_out=outcome.timed_out, message=outcome.message)


def _acts(command: AdaptationCommand) -> bool:
    return command.command_type != CommandType.COMMAND_TYPE_NO_OPERATION


def _timings(asked: _Conversation | None, started: float) -> Timings:
    took = dict(asked.took_ms) if asked is not None else {}
    return Timings(
        open_ms=took.get("open"),
        evaluate_ms=took.get("evaluate"),
        submit_ms=took.get("submit"),
        total_ms=(time.perf_counter() - started) * 1000.0,
    )
