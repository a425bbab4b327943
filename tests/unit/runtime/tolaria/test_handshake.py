"""What the trainer makes of answers in time, late, refused and broken; the sidecars are servers in this process."""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from esper_leyline.reasons import CommandRejection
from esper_leyline.v1.command_pb2 import (
    AdaptationCommand,
    CommandType,
    CommandVerdict,
    OpenBoundaryRequest,
    OpenBoundaryResponse,
    SignedCommand,
)
from esper_leyline.v1.command_pb2_grpc import (
    KasminaAuthorityServiceServicer,
    TamiyoPolicyServiceServicer,
    add_KasminaAuthorityServiceServicer_to_server,
    add_TamiyoPolicyServiceServicer_to_server,
)
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.tolaria.breaker import THRESHOLD
from esper_runtime.tolaria.consult import Consult
from esper_runtime.tolaria.handshake import HARD_DEADLINE_S, SOFT_DEADLINE_S, Boundary, BoundaryResult
from esper_runtime.tolaria.rpc import MAX_MESSAGE
from esper_runtime.tolaria.stability import Part

from tests.support.standing import Ward
from tests.support.waiting import until_sync

PATIENT_S = 10.0
HASTY_S = 0.001
NOTHING = CommandType.COMMAND_TYPE_NO_OPERATION
ROLLBACK = CommandType.COMMAND_TYPE_ROLLBACK
OPTIMIZER = CommandType.COMMAND_TYPE_OPTIMIZER


class Sidecars(KasminaAuthorityServiceServicer, TamiyoPolicyServiceServicer):
    """Answers as the test says; `held` keeps Tamiyo's answer back."""

    def __init__(self) -> None:
        self.command: CommandType = NOTHING
        self.raw: bytes | None = None
        self.verdict = CommandVerdict(accepted=True)
        self.error: tuple[grpc.StatusCode, str] | None = None
        self.deadline_ms = 0
        self.takes_s = 0.0
        self.held = threading.Event()
        self.held.set()
        self.openings: list[OpenBoundaryRequest] = []
        self.packets: list[SystemStatePacket] = []

    def OpenBoundary(self, request: OpenBoundaryRequest, context: Any) -> OpenBoundaryResponse:
        self.openings.append(request)
        return OpenBoundaryResponse(packet_id=f"packet-{len(self.openings)}")

    def Evaluate(self, request: SystemStatePacket, context: Any) -> SignedCommand:
        self.packets.append(request)
        command = AdaptationCommand(
            version=1,
            command_id=f"for {request.packet_id}",
            command_type=self.command,
            execution_deadline_ms=self.deadline_ms,
        )
        time.sleep(self.takes_s)  # what it is late by
        if self.error is not None:
            context.abort(*self.error)
        assert self.held.wait(PATIENT_S)
        return SignedCommand(command=command.SerializeToString() if self.raw is None else self.raw)

    def SubmitCommand(self, request: SignedCommand, context: Any) -> CommandVerdict:
        return self.verdict


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="esper-") as directory:
        yield Path(directory)


@pytest.fixture
def sidecars(run_dir: Path) -> Iterator[Sidecars]:
    made = Sidecars()
    server = served(made, run_dir)
    yield made
    made.held.set()
    server.stop(None).wait()


def served(made: Sidecars, run_dir: Path) -> Any:
    """A server for both sidecars."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    add_KasminaAuthorityServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]
    add_TamiyoPolicyServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]
    for name in ("kasmina", "tamiyo"):
        server.add_insecure_port(f"unix:{run_dir}/{name}.sock")
    server.start()
    return server


class Trainer:
    """A boundary whose patience the test sets per exchange."""

    def __init__(self, run_dir: Path, **options: float) -> None:
        self.boundary = Boundary(run_dir, run_uid="run-1", attempt=3, soft_deadline_s=PATIENT_S, **options)  # type: ignore[arg-type]
        self.epoch = 0

    def exchange(self, patience_s: float = PATIENT_S) -> BoundaryResult:
        self.boundary._soft_deadline_s = patience_s
        self.epoch += 1
        return self.boundary.exchange(SystemStatePacket(current_epoch=self.epoch, global_step=10 * self.epoch))

    def miss(self, sidecars: Sidecars, command: CommandType) -> None:
        """One boundary whose answer comes after its soft deadline."""
        sidecars.command = command
        sidecars.held.clear()
        missed = self.exchange(HASTY_S)
        assert (missed.command, missed.answered) == (None, False)
        sidecars.held.set()
        deadline = time.monotonic() + PATIENT_S
        while not self.boundary.idle:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def trainer(run_dir: Path) -> Trainer:
    return Trainer(run_dir)


def test_the_packet_goes_out_with_run_version_and_the_id_that_kasmina_gave(
    sidecars: Sidecars, trainer: Trainer
) -> None:
    result = trainer.exchange()
    assert sidecars.openings == [OpenBoundaryRequest(run_uid="run-1", attempt=3, epoch=1, step=10)]
    assert sidecars.packets == [
        SystemStatePacket(version=1, training_run_id="run-1", packet_id="packet-1", current_epoch=1, global_step=10)
    ]
    assert result.command is not None
    assert result.command.command_id == "for packet-1"


@pytest.mark.parametrize(
    ("first", "second", "used", "late"),
    [
        pytest.param(ROLLBACK, NOTHING, "for packet-1", True, id="late act is not lost to a newer nothing"),
        pytest.param(NOTHING, NOTHING, "for packet-2", False, id="of two nothings the newer"),
        pytest.param(NOTHING, ROLLBACK, "for packet-2", False, id="newer act"),
        pytest.param(OPTIMIZER, ROLLBACK, "for packet-2", False, id="of two acts the newer"),
    ],
)
def test_a_late_answer_meets_a_newer_one(
    sidecars: Sidecars, trainer: Trainer, first: CommandType, second: CommandType, used: str, late: bool
) -> None:
    trainer.miss(sidecars, first)
    sidecars.command = second
    result = trainer.exchange()
    assert result.command is not None
    assert (result.command.command_id, result.late, result.answered) == (used, late, True)
    assert trainer.exchange().late is False  # used once


def test_while_an_answer_is_awaited_nobody_is_asked_again(sidecars: Sidecars, trainer: Trainer) -> None:
    sidecars.held.clear()
    trainer.exchange(HASTY_S)
    for _ in range(3):
        skipped = trainer.exchange()
        assert (skipped.command, skipped.answered, skipped.timings.open_ms) == (None, False, None)
    sidecars.held.set()
    assert len(sidecars.openings) <= 1


def test_rejections_in_time_and_late_are_both_counted(sidecars: Sidecars, trainer: Trainer) -> None:
    sidecars.verdict = CommandVerdict(reason=CommandRejection.STALE_COMMAND)
    trainer.miss(sidecars, ROLLBACK)
    sidecars.verdict = CommandVerdict(reason=CommandRejection.NONCE_REPLAYED)
    result = trainer.exchange()
    assert result.command is None
    assert result.rejections == (CommandRejection.STALE_COMMAND, CommandRejection.NONCE_REPLAYED)
    assert result.degradations == ()


def test_a_verdict_in_words_of_another_release_is_still_a_rejection(sidecars: Sidecars, trainer: Trainer) -> None:
    sidecars.verdict = CommandVerdict(reason="made_up_later")
    assert trainer.exchange().rejections == (CommandRejection.MALFORMED,)


def test_an_accepted_command_that_cannot_be_read_is_not_acted_on(sidecars: Sidecars, trainer: Trainer) -> None:
    sidecars.raw = b"\xff\xff"
    result = trainer.exchange()
    assert result.command is None
    assert result.rejections == (CommandRejection.MALFORMED,)


def test_an_error_of_a_sidecar_degrades_it_once_with_its_words_cut(sidecars: Sidecars, trainer: Trainer) -> None:
    sidecars.error = grpc.StatusCode.INTERNAL, "out of order " * 50
    first = trainer.exchange()
    assert first.answered
    assert [(one.component, one.degraded) for one in first.degradations] == [("tamiyo", True)]
    assert first.degradations[0].message.startswith("tamiyo does not answer: INTERNAL: out of order")
    assert len(first.degradations[0].message) == MAX_MESSAGE
    assert trainer.exchange().degradations == ()
    sidecars.error = None
    assert [(one.component, one.degraded) for one in trainer.exchange().degradations] == [("tamiyo", False)]


def test_the_hard_deadline_ends_the_wait_and_names_who_was_silent(sidecars: Sidecars, run_dir: Path) -> None:
    trainer = Trainer(run_dir, hard_deadline_s=0.2)
    sidecars.held.clear()
    result = trainer.exchange()
    assert 190 < result.timings.total_ms < 2000
    assert result.timings.open_ms is not None
    assert result.timings.evaluate_ms is None
    assert [one.message for one in result.degradations] == ["tamiyo gave no answer within the hard deadline"]


def test_an_exchange_needs_no_sidecar_at_all(trainer: Trainer) -> None:
    result = trainer.exchange()
    assert result.command is None
    assert result.answered
    assert trainer.boundary.degraded == {"kasmina"}
    trainer.boundary.close()


# A Tamiyo that sleeps


class Asleep(Sidecars):
    """Tamiyo takes every question and answers none; it wakes when the trainer hangs up."""

    def Evaluate(self, request: SystemStatePacket, context: Any) -> SignedCommand:
        hung_up = threading.Event()
        if context.add_callback(hung_up.set):
            assert hung_up.wait(PATIENT_S)
        return SignedCommand()


@pytest.fixture
def asleep(run_dir: Path) -> Iterator[Asleep]:
    made = Asleep()
    server = served(made, run_dir)
    yield made
    server.stop(None).wait()


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that trainers of other tests have left to the end of the process are none of these tests' business."""
    monkeypatch.setattr(sys.modules[__name__], "OTHERS", frozenset(threading.enumerate()))


OTHERS: frozenset[threading.Thread] = frozenset()


def threads_of_boundaries() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "boundary" and thread not in OTHERS]


def settled(boundary: Boundary) -> None:
    until_sync(lambda: not boundary.awaiting and boundary.idle, what="the conversation ended")


@pytest.mark.row("T05")
def test_a_sleeping_tamiyo_holds_nobody_and_is_one_timeout_after_the_hard_deadline(
    asleep: Asleep, run_dir: Path, tmp_path: Path
) -> None:
    ward = Ward(tmp_path)
    boundary = Boundary(run_dir, run_uid="run-1", attempt=3)
    consult = Consult(
        handshake=boundary, standing=ward.standing, metrics=ward.metrics, facts=ward.facts, events=ward.events
    )
    began = time.monotonic()
    answers = [consult.ask(SystemStatePacket()) for _ in range(3)]  # the second and third ask nobody
    assert time.monotonic() - began < HARD_DEADLINE_S
    assert (SOFT_DEADLINE_S, HARD_DEADLINE_S) == (0.012, 2.0)
    assert answers[0] is not None
    assert answers[0].timings.total_ms > 11.0
    for result in answers:
        assert result is not None
        assert (result.command, result.heard, result.silent) == (None, frozenset(), ())
        assert consult.account(result) is None
        consult.report(result)
    assert ward.metrics.value("tolaria.timeout.tamiyo_total") is None
    settled(boundary)
    assert time.monotonic() - began > HARD_DEADLINE_S * 0.9
    assert len(asleep.openings) == 1
    result = boundary.collect()
    assert [(silence.component, silence.timed_out) for silence in result.silent] == [("tamiyo", True)]
    assert result.heard == {"kasmina"}
    assert consult.account(result) is False
    consult.report(result)
    assert ward.metrics.value("tolaria.timeout.tamiyo_total") == 1
    assert ward.metrics.value("tolaria.timeout.tamiyo_last_ms") == 0
    assert ward.metrics.value("tolaria.timeout.kasmina_total") is None
    assert ward.standing._breakers[Part.TAMIYO].failures == 1
    assert ward.standing.conservative
    assert boundary.collect().silent == ()  # told once


@pytest.mark.row("T05")
@pytest.mark.row("T36")
def test_a_thousand_timeouts_leave_no_thread_and_no_descriptor(asleep: Asleep, run_dir: Path) -> None:
    boundary = Boundary(run_dir, run_uid="run-1", attempt=3, soft_deadline_s=PATIENT_S, hard_deadline_s=0.004)

    def sleep_through(times: int) -> int:
        timeouts = 0
        for _ in range(times):
            timeouts += sum(silence.timed_out for silence in boundary.exchange(SystemStatePacket()).silent)
            settled(boundary)
        return timeouts

    sleep_through(10)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    assert sleep_through(1000) == 1000
    assert len(threads_of_boundaries()) == 1
    # gRPC keeps a thread of its own now and then; what a thousand timeouts leaked would be a thousand.
    until_sync(lambda: threading.active_count() < threads + 10, what="hardly a thread more")
    until_sync(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, what="no descriptor more")
    boundary.close()
    assert not threads_of_boundaries()


@pytest.mark.row("T06")
def test_a_command_is_refused_when_its_execution_deadline_is_over_before_it_can_act(
    sidecars: Sidecars, trainer: Trainer
) -> None:
    sidecars.deadline_ms = 60_000
    assert trainer.exchange().command is not None
    sidecars.deadline_ms, sidecars.takes_s = 1, 0.005
    result = trainer.exchange()
    assert result.command is None
    assert result.rejections == (CommandRejection.EXPIRED,)


def test_a_new_process_behind_a_socket_shows(run_dir: Path) -> None:
    boundary = Boundary(run_dir, run_uid="run-1", attempt=3)
    assert boundary.signs_of_life() == {"kasmina": (0, 0), "tamiyo": (0, 0)}
    first = served(Sidecars(), run_dir)
    alive = boundary.signs_of_life()
    assert all(any(identity) for identity in alive.values())
    assert boundary.signs_of_life() == alive
    first.stop(None).wait()
    second = served(Sidecars(), run_dir)
    again = boundary.signs_of_life()
    second.stop(None).wait()
    assert all(again[name] != alive[name] for name in alive)


# The thread and the channels that stay


def test_boundaries_share_a_thread_and_their_channels_until_somebody_fails(
    sidecars: Sidecars, trainer: Trainer
) -> None:
    lines = trainer.boundary._speaker.lines
    trainer.exchange()
    kept, (thread,) = (lines.kasmina._channel, lines.tamiyo._channel), threads_of_boundaries()
    assert None not in kept
    trainer.exchange()
    assert (lines.kasmina._channel, lines.tamiyo._channel) == kept
    sidecars.error = grpc.StatusCode.INTERNAL, "out of order"
    trainer.exchange()
    assert (lines.kasmina._channel, lines.tamiyo._channel) == (None, None)
    sidecars.error = None
    assert trainer.exchange().command is not None
    assert threads_of_boundaries() == [thread]


def test_another_process_behind_the_sockets_is_asked_over_new_channels(run_dir: Path, trainer: Trainer) -> None:
    first, second = Sidecars(), Sidecars()
    server = served(first, run_dir)
    assert trainer.exchange().command is not None
    for socket in run_dir.glob("*.sock"):
        socket.unlink()
    successor = served(second, run_dir)  # while the old one still answers
    result = trainer.exchange()
    assert (result.command is not None, result.silent) == (True, ())
    assert (len(first.openings), len(second.openings)) == (1, 1)
    for one in (server, successor):
        one.stop(None).wait()


def test_a_sidecar_that_restarts_between_boundaries_costs_none(run_dir: Path, trainer: Trainer) -> None:
    for _ in range(3):
        server = served(Sidecars(), run_dir)
        result = trainer.exchange()
        assert (result.command is not None, result.silent) == (True, ())
        server.stop(None).wait()


def test_a_fork_between_boundaries_leaves_no_channel_to_the_child(sidecars: Sidecars, trainer: Trainer) -> None:
    trainer.exchange()
    child = os.fork()
    lines = trainer.boundary._speaker.lines
    if child == 0:
        os._exit(0 if lines.kasmina._channel is lines.tamiyo._channel is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert trainer.exchange().command is not None


def test_a_conversation_that_breaks_on_our_own_mistake_is_shown_and_the_next_one_goes_well(
    sidecars: Sidecars, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: shown.append(arguments.exc_value))
    sidecars.verdict = CommandVerdict(accepted=True)
    with monkeypatch.context() as broken:
        broken.setattr("esper_runtime.tolaria.handshake._Conversation._take", lambda *_: [][0])
        assert trainer.exchange().command is None
    assert trainer.exchange().command is not None
    until_sync(lambda: len(threads_of_boundaries()) == 1, what="the broken thread ended")
    assert [type(one) for one in shown] == [IndexError]


@pytest.mark.row("T05")
def test_at_a_limit_of_threads_training_goes_on_without_tamiyo_and_says_so_once(
    sidecars: Sidecars, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ward = Ward(tmp_path)
    boundary = Boundary(run_dir, run_uid="run-1", attempt=3, soft_deadline_s=PATIENT_S)
    consult = Consult(
        handshake=boundary, standing=ward.standing, metrics=ward.metrics, facts=ward.facts, events=ward.events
    )
    for _ in range(THRESHOLD):
        ward.standing.failed(Part.TAMIYO, "asleep")
    ward.clock.pass_s(30.1)  # the next question is the probe of an open breaker

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as limit:
        limit.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            result = consult.ask(SystemStatePacket())
            assert result is not None
            assert (result.command, result.answered, result.silent, result.unasked) == (None, False, (), True)
            assert consult.account(result) is None
    assert [record.getMessage() for record in caplog.records if "no thread to ask" in record.getMessage()] == [
        "no thread to ask Tamiyo in, training goes on without its word: can't start new thread"
    ]
    assert ward.standing.ready(Part.TAMIYO)
    answered = consult.ask(SystemStatePacket())
    assert answered is not None
    assert answered.command is not None
    boundary.close()
