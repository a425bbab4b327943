"""Sidecars that are missing, dead, frozen or slow: training goes on within the soft deadline, and is told once."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from esper_leyline.labels import KASMINA, TAMIYO
from esper_leyline.reasons import CommandRejection, RunReason
from esper_leyline.v1.command_pb2 import CommandType
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.tolaria.handshake import Boundary, BoundaryResult

from tests.support.sidecars import Sidecars, wait_until
from tests.support.waiting import PATIENT_S

pytestmark = pytest.mark.timeout(180)
PATIENT = {"soft_deadline_s": PATIENT_S, "hard_deadline_s": PATIENT_S}
LATE = "hard deadline"
"""In the words of a degradation: somebody was waited for to the end."""


def packet(epoch: int) -> SystemStatePacket:
    return SystemStatePacket(current_epoch=epoch, global_step=epoch + 1, training_loss=1.0, validation_loss=1.0)


def boundary_of(sidecars: Sidecars, **options: float) -> Boundary:
    return Boundary(sidecars.run_dir, run_uid=sidecars.run_uid, attempt=1, **options)  # type: ignore[arg-type]


def patient(sidecars: Sidecars) -> Boundary:
    """Its deadlines are so long that only an event ends an exchange."""
    return boundary_of(sidecars, **PATIENT)


def changes(result: BoundaryResult) -> list[tuple[str, bool]]:
    assert all(change.reason == RunReason.SIDECAR_DOWN for change in result.degradations)
    return [(change.component, change.degraded) for change in result.degradations]


@contextmanager
def slow_tamiyo(
    sidecars: Sidecars, command_type: int = CommandType.COMMAND_TYPE_ROLLBACK, deadline_ms: int = 0
) -> Iterator[Path]:
    """Answers once for each time that the file which this gives is made."""
    script = Path(__file__).with_name("slow_tamiyo.py")
    key = sidecars.directory / "keys/tamiyo/tamiyo.key"
    gate = sidecars.directory / "answer"
    words = [sidecars.run_dir / "tamiyo.sock", key, sidecars.run_uid, gate, int(command_type), deadline_ms]
    process = subprocess.Popen([sys.executable, str(script), *map(str, words)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == b"listening\n"
        try:
            yield gate
        finally:
            process.kill()
            process.wait()


def test_missing_sidecars_cost_no_deadline_and_are_found_when_they_come(sidecars: Sidecars) -> None:
    boundary = patient(sidecars)
    first = boundary.exchange(packet(0))
    assert first.command is None
    assert changes(first) == [(KASMINA, True)]
    assert "No such file" in first.degradations[0].message  # refused by the kernel, not waited for
    assert first.timings.total_ms < PATIENT_S * 1000 / 2
    assert changes(boundary.exchange(packet(1))) == []
    sidecars.start("kasmina")
    without_tamiyo = boundary.exchange(packet(2))
    assert changes(without_tamiyo) == [(KASMINA, False), (TAMIYO, True)]
    sidecars.start("tamiyo")
    whole = boundary.exchange(packet(3))
    assert changes(whole) == [(TAMIYO, False)]
    assert whole.command is not None
    assert boundary.degraded == frozenset()


def test_a_stale_socket_file_is_as_quick_as_none_and_is_replaced(sidecars: Sidecars) -> None:
    sidecars.start("tamiyo")
    sidecars.start("kasmina").kill()
    socket = sidecars.run_dir / "kasmina.sock"
    assert socket.is_socket()
    boundary = patient(sidecars)
    result = boundary.exchange(packet(0))
    assert changes(result) == [(KASMINA, True)]
    assert "refused" in result.degradations[0].message
    assert result.timings.total_ms < PATIENT_S * 1000 / 2
    sidecars.start("kasmina")
    assert boundary.exchange(packet(1)).command is not None


@pytest.mark.row("K63")
def test_a_killed_worker_is_back_within_seconds_and_answers_the_next_boundary(sidecars: Sidecars) -> None:
    kasmina, _ = sidecars.start("kasmina"), sidecars.start("tamiyo")
    boundary = patient(sidecars)
    assert boundary.exchange(packet(0)).command is not None
    dead = kasmina.worker()
    dead.kill()
    wait_until(lambda: not dead.is_running() and kasmina.worker().pid != dead.pid, "a new worker")
    kasmina.wait_ready()
    wait_until(lambda: boundary.exchange(packet(1)).command is not None, "commands again")
    assert boundary.degraded == frozenset()


@pytest.mark.row("K63")
@pytest.mark.parametrize("name", [KASMINA, TAMIYO])
def test_a_frozen_sidecar_holds_training_for_the_soft_deadline_only(sidecars: Sidecars, name: str) -> None:
    running = {one: sidecars.start(one) for one in (KASMINA, TAMIYO)}
    boundary = boundary_of(sidecars, soft_deadline_s=1.0, hard_deadline_s=3.0)
    wait_until(lambda: boundary.exchange(packet(0)).answered, "a boundary within the soft deadline")
    running[name].freeze()
    missed = boundary.exchange(packet(1))
    assert missed.command is None
    assert not missed.answered
    assert missed.degradations == ()  # one slow answer is no fault
    assert not boundary.idle  # training went on before the hard deadline
    skipped = boundary.exchange(packet(2))
    assert skipped.timings.total_ms < 1000  # an answer is awaited: no second question, which would take a deadline
    seen: list[tuple[str, bool]] = []
    wait_until(lambda: bool(seen.extend(changes(boundary.exchange(packet(3)))) or seen), "the degradation")
    assert seen == [(name, True)]
    running[name].thaw()
    wait_until(lambda: bool(seen.extend(changes(boundary.exchange(packet(4)))) or seen[1:]), "the recovery")
    assert seen == [(name, True), (name, False)]


@pytest.mark.row("K63")
def test_a_sidecar_killed_in_the_middle_of_a_call_ends_the_wait(sidecars: Sidecars) -> None:
    kasmina, tamiyo = sidecars.start("kasmina"), sidecars.start("tamiyo")
    boundary = patient(sidecars)
    tamiyo.freeze()
    results: list[BoundaryResult] = []
    trainer = threading.Thread(target=lambda: results.append(boundary.exchange(packet(0))))
    trainer.start()
    wait_until(lambda: kasmina.metric("esper_kasmina_boundaries_opened_total") == 1, "the boundary is open")
    tamiyo.kill()
    trainer.join()
    assert changes(results[0]) == [(TAMIYO, True)]
    assert LATE not in results[0].degradations[0].message


def test_a_late_answer_is_used_at_the_next_boundary(sidecars: Sidecars) -> None:
    sidecars.start("kasmina")
    with slow_tamiyo(sidecars) as gate:
        boundary = boundary_of(sidecars, hard_deadline_s=PATIENT_S)
        missed = boundary.exchange(packet(0))
        assert missed.command is None
        assert not boundary.idle
        gate.touch()
        wait_until(lambda: boundary.idle, "the late answer")
        result = boundary.exchange(packet(1))
        assert result.command is not None
        assert result.command.command_id == "command-1"
        assert result.late
        assert not result.answered
        assert result.degradations == ()


def test_a_late_command_past_its_execution_deadline_is_stale(sidecars: Sidecars) -> None:
    sidecars.start("kasmina")
    with slow_tamiyo(sidecars, deadline_ms=50) as gate:
        boundary = boundary_of(sidecars, hard_deadline_s=PATIENT_S)
        boundary.exchange(packet(0))
        time.sleep(0.05)  # what it is late by
        gate.touch()
        wait_until(lambda: boundary.idle, "the late answer")
        result = boundary.exchange(packet(1))
        assert result.command is None
        assert result.rejections == (CommandRejection.EXPIRED,)


@pytest.mark.row("T07")
def test_an_unsound_command_is_a_rejection_and_no_fault_of_a_sidecar(sidecars: Sidecars) -> None:
    kasmina = sidecars.start("kasmina")
    (sidecars.directory / "keys/tamiyo/tamiyo.key").write_text("11" * 32 + "\n")
    sidecars.start("tamiyo")
    boundary = patient(sidecars)
    result = boundary.exchange(packet(0))
    assert result.command is None
    assert result.answered
    assert result.rejections == (CommandRejection.UNKNOWN_KEY_ID,)
    assert result.degradations == ()
    assert kasmina.metric('esper_kasmina_command_verifier_rejections_total{reason="unknown_key_id"}') == 1


def test_a_packet_of_another_run_is_refused_in_words(sidecars: Sidecars) -> None:
    sidecars.start("kasmina")
    boundary = Boundary(sidecars.run_dir, run_uid="another", attempt=1, **PATIENT)
    result = boundary.exchange(packet(0))
    assert changes(result) == [(KASMINA, True)]
    assert f"run_uid is 'another'; this verifier serves '{sidecars.run_uid}'" in result.degradations[0].message


def test_closing_gives_up_on_an_awaited_answer(sidecars: Sidecars) -> None:
    sidecars.start("kasmina")
    with slow_tamiyo(sidecars):
        others = set(threading.enumerate())
        boundary = boundary_of(sidecars, hard_deadline_s=60.0)
        boundary.exchange(packet(0))
        assert not boundary.idle
        boundary.close()
        assert boundary.idle
        assert set(threading.enumerate()) <= others


def test_a_restarted_trainer_hears_that_a_sidecar_is_well(sidecars: Sidecars) -> None:
    for name in (KASMINA, TAMIYO):
        sidecars.start(name)
    boundary = Boundary(sidecars.run_dir, run_uid=sidecars.run_uid, attempt=1, restarted=True, **PATIENT)
    assert changes(boundary.exchange(packet(0))) == [(KASMINA, False), (TAMIYO, False)]
    assert changes(boundary.exchange(packet(1))) == []


def test_training_makes_no_noise_about_a_missing_sidecar(sidecars: Sidecars) -> None:
    code = (
        "import sys; from pathlib import Path; from esper_runtime.tolaria.handshake import Boundary;"
        "from esper_leyline.v1.telemetry_pb2 import SystemStatePacket as P;"
        "b = Boundary(Path(sys.argv[1]), run_uid='r', attempt=1, soft_deadline_s=5.0);"
        "r = [b.exchange(P()) for _ in range(3)]; assert b.degraded == {'kasmina'}, r"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(sidecars.run_dir)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENT_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


LATE_TRAINER = """
import multiprocessing, sys
from pathlib import Path
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.tolaria.handshake import Boundary
boundary = Boundary(Path(sys.argv[1]), run_uid=sys.argv[2], attempt=1, hard_deadline_s=60.0)
assert not boundary.exchange(SystemStatePacket()).answered
assert not boundary.idle
if sys.argv[3] == "forks":
    child = multiprocessing.get_context("fork").Process(target=sys.exit, args=(5,))
    child.start()
    child.join(10)
    sys.exit(child.exitcode)
sys.exit(7)
"""


@pytest.mark.parametrize(("does", "code"), [("ends", 7), ("forks", 5)])
def test_a_trainer_may_end_or_fork_beside_an_awaited_answer(sidecars: Sidecars, does: str, code: int) -> None:
    sidecars.start("kasmina")
    with slow_tamiyo(sidecars):
        done = subprocess.run(
            [sys.executable, "-c", LATE_TRAINER, str(sidecars.run_dir), sidecars.run_uid, does],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENT_S,
        )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
