"""The trainer's side of an epoch boundary: asks Kasmina and Tamiyo for a verified command, and never waits for them.

    boundary = Boundary(run_dir, run_uid=uid, attempt=attempt, restarted=trainer_start > 1)   # once; warms gRPC up
    result = boundary.exchange(packet)            # after validation; packet without packet_id; <= 12 ms, never raises
    for change in result.degradations: journal a RuntimeEvent(degradation=change)
    counters.rejected_commands += len(result.rejections)
    if result.command is not None: act on it      # verified; NO_OPERATION is a command too; None = train on

The calls run in a thread that lives for one boundary, over channels that do too. So a sidecar that came back is found
at the next boundary without any back-off, and between boundaries no gRPC thread or channel is there that a fork of
loader workers could break (unless an answer is late: see `idle`). After the soft deadline training goes on; the
answer, when it comes within the hard deadline, is used at the next boundary. While one is awaited no other is asked.
Who asks at all, the breakers decide; `collect` is for boundaries at which nobody may be asked.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
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
        self._sockets = _Sockets(kasmina=run_dir / KASMINA_SOCKET, tamiyo=run_dir / TAMIYO_SOCKET)
        self._run_uid = run_uid
        self._attempt = attempt
        self._soft_deadline_s = soft_deadline_s
        self._hard_deadline_s = hard_deadline_s
        assumed = None if restarted else False
        self._degraded: dict[str, bool | None] = {KASMINA: assumed, TAMIYO: assumed}
        self._awaited: _Conversation | None = None
        self._newest: _Conversation | None = None
        rpc.warm_up(self._sockets.kasmina)

    @property
    def idle(self) -> bool:
        """No conversation is going on, so that forking is safe."""
        return self._newest is None or not self._newest.running

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
        return {KASMINA: _identity(self._sockets.kasmina), TAMIYO: _identity(self._sockets.tamiyo)}

    def exchange(self, packet: SystemStatePacket) -> BoundaryResult:
        """One boundary, held for the soft deadline at most. `packet` stays as it is; version, run and id are ours."""
        started = time.perf_counter()
        if self.awaiting:
            return self._result((), None, started)
        earlier = self._awaited
        asked = _Conversation(
            _addressed(packet, self._run_uid), self._sockets, attempt=self._attempt, deadline_s=self._hard_deadline_s
        )
        self._newest = asked
        asked.start()
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
        """Gives up on an answer that is still awaited."""
        if self._awaited is not None:
            self._awaited.cancel()
            self._awaited = None

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


@dataclass(frozen=True, slots=True)
class _Sockets:
    kasmina: Path
    tamiyo: Path


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


class _Conversation:
    """OpenBoundary, Evaluate, SubmitCommand, one after the other in a thread of its own."""

    def __init__(self, packet: SystemStatePacket, sockets: _Sockets, *, attempt: int, deadline_s: float) -> None:
        self.done = threading.Event()
        self.outcome = _Outcome()
        self.took_ms: dict[str, float] = {}
        self.started = time.monotonic()
        self._packet = packet
        self._sockets = sockets
        self._attempt = attempt
        self._deadline = self.started + deadline_s
        self._channels: list[rpc.Channel] = []
        self._cancelled = False
        # A daemon, so that an unanswered call does not keep a trainer that wants to end.
        self._thread = threading.Thread(target=self._run, name="boundary", daemon=True)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def cancel(self) -> None:
        """Ends the calls at once and waits for the thread, which has then nothing left to wait for."""
        self._cancelled = True
        for channel in tuple(self._channels):
            channel.close()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        component = KASMINA
        try:
            kasmina = rpc.kasmina(self._channel(self._sockets.kasmina))
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
            tamiyo = rpc.tamiyo(self._channel(self._sockets.tamiyo))
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
        except ValueError:
            # grpc's word for a call on a closed channel. Anything else is our own mistake and must be seen.
            if not self._cancelled:
                raise
        finally:
            self.done.set()
            for channel in self._channels:
                channel.close()

    def _channel(self, socket: Path) -> rpc.Channel:
        channel = rpc.channel(socket)
        self._channels.append(channel)
        if self._cancelled:
            channel.close()
        return channel

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
    return (None, command) if age_ms <= command.execution_deadline_ms else (CommandRejection.STALE_COMMAND, None)


def _silence(outcome: _Outcome) -> Silence:
    return Silence(component=outcome.failed, timed_out=outcome.timed_out, message=outcome.message)


def _identity(socket: Path) -> tuple[int, int]:
    """(inode, time of its last change); zeros when there is none."""
    try:
        found = socket.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_ctime_ns


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
