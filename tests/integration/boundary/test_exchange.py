"""One boundary after the other with real kasmina and tamiyo processes."""

import os
import subprocess
import sys
import threading

from esper_leyline.v1.command_pb2 import AdaptationCommand, CommandType, RiskReason
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.tolaria.handshake import Boundary, BoundaryResult

from tests.support.sidecars import Sidecars
from tests.support.waiting import PATIENT_S

PATIENT = {"soft_deadline_s": PATIENT_S, "hard_deadline_s": PATIENT_S}
"""These tests are about answers and not about time."""


def packet(epoch: int, **facts: float) -> SystemStatePacket:
    return SystemStatePacket(current_epoch=epoch, global_step=100 * epoch + 100, **facts)


def commanded(result: BoundaryResult) -> AdaptationCommand:
    assert result.command is not None, result
    return result.command


def test_a_good_epoch_brings_an_explicit_no_operation(sidecars: Sidecars) -> None:
    kasmina, tamiyo = sidecars.start("kasmina", ready=False), sidecars.start("tamiyo")
    kasmina.wait_ready()
    boundary = Boundary(sidecars.run_dir, run_uid=sidecars.run_uid, attempt=1, **PATIENT)
    sent = packet(0, training_loss=1.0, validation_loss=1.1)
    untouched = SystemStatePacket.FromString(sent.SerializeToString())
    result = boundary.exchange(sent)
    command = commanded(result)
    assert command.command_type == CommandType.COMMAND_TYPE_NO_OPERATION
    assert command.metadata.training_run_id == sidecars.run_uid
    assert len(command.metadata.packet_id) == 32
    assert command.rationale == "validation loss 1.1 is the best so far"
    assert result.answered
    assert (result.late, result.rejections, result.degradations) == (False, (), ())
    assert sent == untouched
    timings = result.timings
    assert timings.open_ms
    assert timings.evaluate_ms
    assert timings.submit_ms
    assert timings.open_ms + timings.evaluate_ms + timings.submit_ms <= timings.total_ms
    assert kasmina.metric("esper_kasmina_command_verifier_accepted_total") == 1
    assert kasmina.metric('esper_kasmina_command_verifier_rejections_total{reason="nonce_replayed"}') == 0
    assert tamiyo.metric('esper_tamiyo_decisions_total{command_type="COMMAND_TYPE_NO_OPERATION"}') == 1


def test_a_validation_regression_scales_the_learning_rate_and_a_broken_loss_rolls_back(sidecars: Sidecars) -> None:
    for name in ("kasmina", "tamiyo"):
        sidecars.start(name)
    boundary = Boundary(sidecars.run_dir, run_uid=sidecars.run_uid, attempt=1, **PATIENT)
    commands = [
        commanded(boundary.exchange(packet(epoch, training_loss=1.0, validation_loss=loss)))
        for epoch, loss in enumerate((1.0, 1.5, 1.6, 1.7))
    ]
    assert [c.command_type for c in commands[:3]] == [CommandType.COMMAND_TYPE_NO_OPERATION] * 3
    scaled = commands[3]
    assert scaled.command_type == CommandType.COMMAND_TYPE_OPTIMIZER
    assert scaled.optimizer_adjustment.learning_rate_scale == 0.5
    assert scaled.metadata.risk.reason == RiskReason.RISK_REASON_VALIDATION_REGRESSION
    assert scaled.metadata.risk.conservative_mode
    broken = commanded(boundary.exchange(packet(4, training_loss=float("nan"), validation_loss=1.0)))
    assert broken.command_type == CommandType.COMMAND_TYPE_ROLLBACK
    assert broken.rollback.reason == "training loss is nan: roll back"


def test_a_fork_between_boundaries_finds_nothing_of_grpc_that_the_child_has_to_end(sidecars: Sidecars) -> None:
    """User code may fork there, and a child that takes down its interpreter would wait for gRPC's threads."""
    for name in ("kasmina", "tamiyo"):
        sidecars.start(name)
    done = subprocess.run(
        [sys.executable, "-c", FORKING_TRAINER, str(sidecars.run_dir), sidecars.run_uid],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENT_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


FORKING_TRAINER = """
import os, sys
from pathlib import Path
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.tolaria.handshake import Boundary
boundary = Boundary(Path(sys.argv[1]), run_uid=sys.argv[2], attempt=1, soft_deadline_s=10.0, hard_deadline_s=10.0)
for epoch in range(5):
    answer = boundary.exchange(SystemStatePacket(current_epoch=epoch, global_step=epoch, training_loss=1.0))
    assert answer.command is not None, answer
    assert boundary.idle
    child = os.fork()
    if child == 0:
        sys.exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
sys.exit(7)
"""


def test_boundaries_make_no_threads_and_no_descriptors_once_the_first_was_there(sidecars: Sidecars) -> None:
    for name in ("kasmina", "tamiyo"):
        sidecars.start(name)
    others = set(threading.enumerate())
    boundary = Boundary(sidecars.run_dir, run_uid=sidecars.run_uid, attempt=1, **PATIENT)
    commanded(boundary.exchange(packet(0)))
    descriptors = len(os.listdir("/proc/self/fd"))
    for epoch in range(1, 20):
        commanded(boundary.exchange(packet(epoch)))
    assert [thread.name for thread in set(threading.enumerate()) - others] == ["boundary"]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    boundary.close()
    assert set(threading.enumerate()) <= others
