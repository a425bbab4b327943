"""Harm by orders: false ones for Kasmina, a true one to stop, and losses that are no numbers."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from esper_leyline.paths import KASMINA_SOCKET, TAMIYO_SOCKET
from esper_leyline.reasons import CommandRejection
from esper_leyline.signing import TAMIYO_PRIVATE, TAMIYO_PUBLIC, Role, SigningKey, announced, sign_command
from esper_leyline.v1.command_pb2 import (
    COMMAND_TYPE_NO_OPERATION,
    AdaptationCommand,
    CommandVerdict,
    DecisionMetadata,
    OpenBoundaryRequest,
    SignedCommand,
)
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.local.volumes import project
from esper_runtime.tolaria import rpc

from tests.drills.drill import Drill, Notes
from tests.drills.stage import STEPS_PER_EPOCH, Stage

ANSWER_S: Final = 10.0
ROLLBACKS: Final = 3
ROTATIONS: Final = 2
_ACCEPTED: Final = "sum(esper_kasmina_command_verifier_accepted_total)"
_REFUSED: Final = "sum(esper_kasmina_command_verifier_rejections_total)"


class Intruder:
    """Somebody in the pod who reaches the sockets and has no key."""

    def __init__(self, stage: Stage) -> None:
        self.uid = stage.laptop.uid()
        self._channels = [rpc.channel(stage.run_dir / name) for name in (KASMINA_SOCKET, TAMIYO_SOCKET)]
        self._kasmina: Any = rpc.kasmina(self._channels[0])
        self._tamiyo: Any = rpc.tamiyo(self._channels[1])

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def packet_id(self) -> str:
        request = OpenBoundaryRequest(run_uid=self.uid, attempt=1)
        return str(self._kasmina.OpenBoundary(request, timeout=ANSWER_S).packet_id)

    def submit(self, command: SignedCommand) -> CommandVerdict:
        return self._kasmina.SubmitCommand(command, timeout=ANSWER_S)

    def recorded(self) -> SignedCommand:
        """A command that Tamiyo signed."""
        packet = SystemStatePacket(version=1, packet_id=self.packet_id(), training_run_id=self.uid)
        return self._tamiyo.Evaluate(packet, timeout=ANSWER_S)

    def forged(self, key: SigningKey) -> SignedCommand:
        """A command that is right in all but its key."""
        packet_id = self.packet_id()
        command = AdaptationCommand(
            version=1,
            command_id=str(uuid.uuid4()),
            command_type=COMMAND_TYPE_NO_OPERATION,
            issued_by="tamiyo",
            metadata=DecisionMetadata(training_run_id=self.uid, packet_id=packet_id),
        )
        command.issued_at.GetCurrentTime()
        return sign_command(command, run_uid=self.uid, key=key)


@contextmanager
def false_commands(stage: Stage, notes: Notes) -> Iterator[None]:
    """One with another key, and a good one a second time."""
    intruder = Intruder(stage)
    try:
        foreign = SigningKey.derive(b"x" * 32, intruder.uid, Role.TAMIYO)
        verdicts = [intruder.submit(intruder.forged(foreign))]
        replayed = intruder.recorded()
        assert intruder.submit(replayed).accepted, "the recorded one is good the first time"
        verdicts.append(intruder.submit(replayed))
    finally:
        intruder.close()
    reasons = [CommandRejection(verdict.reason).value for verdict in verdicts]
    assert not any(verdict.accepted for verdict in verdicts), reasons
    notes.add(f"refused: {', '.join(reasons)}")
    yield


@contextmanager
def key_rotation(stage: Stage, notes: Notes) -> Iterator[None]:
    """Tamiyo's keys are rotated while it trains; then somebody comes with the key that was in force at first."""
    intruder = Intruder(stage)
    seed, uid = (stage.laptop.state / "seed").read_bytes(), intruder.uid
    try:
        for generation in range(2, 2 + ROTATIONS):
            public = announced(seed, uid, Role.TAMIYO, generation)
            private = SigningKey.derive(seed, uid, Role.TAMIYO, generation).to_text()
            for item, text in ((TAMIYO_PUBLIC, public), (TAMIYO_PRIVATE, private)):
                project(stage.keys(item), {item: text.encode()}, mode=0o600)
                stage.train(2 * STEPS_PER_EPOCH)  # boundaries while only one of them knows
        refused = stage.value(_REFUSED)
        assert refused == 0, f"{refused:.0f} commands were refused in a rotation"
        verdict = intruder.submit(intruder.forged(SigningKey.derive(seed, uid, Role.TAMIYO)))
    finally:
        intruder.close()
    assert not verdict.accepted
    before = stage.value(_ACCEPTED)
    stage.until(lambda: stage.value(_ACCEPTED) > before, "commands under the newest key")
    notes.add(f"{ROTATIONS} rotations refused no command; the old key: {CommandRejection(verdict.reason).value}")
    yield


@contextmanager
def halt(stage: Stage, notes: Notes) -> Iterator[None]:
    """All runs with a label are told to stop where they are."""
    said = stage.laptop.esper("halt", "-l", "drill=yes", "--mode", "Freeze")
    assert said.returncode == 0, said.stderr
    halted = stage.until(lambda: (h := stage.laptop.status().get("halt", {})).get("completedTime") and h, "a halt")
    assert halted["acknowledged"] == halted["expected"] == 1, halted
    stands = stage.laptop.step()
    notes.add(f"acknowledged {halted['acknowledged']}/{halted['expected']} within {halted['milliseconds']} ms")
    yield
    assert stage.laptop.step() == stands, "it trained while it was halted"
    notes.mend()
    said = stage.laptop.esper("resume", stage.laptop.name)
    assert said.returncode == 0, said.stderr


@contextmanager
def nan(stage: Stage, notes: Notes) -> Iterator[None]:
    """Losses that are no numbers, three times."""
    for number in range(1, ROLLBACKS + 1):
        stage.train(20)  # so that there is something to go back to
        (stage.run.directory / "nan").touch()
        stage.until(lambda n=number: stage.laptop.status().get("rollbacks", {}).get("total") == n, f"rollback {number}")
    recovery = stage.laptop.status()["lastRecovery"]
    notes.add(f"{ROLLBACKS} rollbacks, the last from step {recovery['fromStep']} to {recovery['toStep']}")
    yield


DRILLS: Final = (
    Drill(
        name="false-command",
        harm="kasmina gets a forged command and a replayed one",
        alerts=("KasminaCommandForged",),
        fault=false_commands,
    ),
    Drill(
        name="key-rotation",
        harm="Tamiyo's keys are rotated; then a command comes under the retired one",
        alerts=("KasminaCommandForged",),
        fault=key_rotation,
    ),
    Drill(
        name="halt",
        harm="`esper halt -l` freezes the run",
        alerts=("WeatherlightEmergencyHalt",),
        fault=halt,
    ),
    Drill(
        name="nan",
        harm=f"the loss is NaN, {ROLLBACKS} times",
        alerts=("TolariaRollbacksRepeat",),
        fault=nan,
        same_end=False,
        why_other_end="the batches that went bad are left out",
        spec={"rollback": {"maxRollbacks": 10}},
    ),
)
