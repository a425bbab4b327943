"""Tamiyo's keys are rotated while boundaries are exchanged, whichever side learns of it first."""

import os

import pytest
from esper_leyline.signing import TAMIYO_PRIVATE, TAMIYO_PUBLIC, Role, SigningKey, announced
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.tolaria.handshake import Boundary

from tests.support.sidecars import SEED, Sidecars
from tests.support.waiting import PATIENT_S

ROTATIONS = 6


def mount(sidecars: Sidecars, container: str, item: str, text: str) -> None:
    """As the kubelet does: all at once."""
    path = sidecars.directory / "keys" / container / item
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


@pytest.mark.row("T07")
def test_no_command_is_refused_in_a_rotation(sidecars: Sidecars) -> None:
    uid = sidecars.run_uid
    mount(sidecars, "kasmina", TAMIYO_PUBLIC, announced(SEED, uid, Role.TAMIYO, 1))
    kasmina, _ = sidecars.start("kasmina"), sidecars.start("tamiyo")
    boundary = Boundary(sidecars.run_dir, run_uid=uid, attempt=1, soft_deadline_s=PATIENT_S, hard_deadline_s=PATIENT_S)
    key_ids = set()

    def exchange() -> None:
        result = boundary.exchange(SystemStatePacket(global_step=len(key_ids), training_loss=1.0))
        assert result.command is not None, result
        assert result.rejections == ()

    exchange()
    for generation in range(2, ROTATIONS + 2):
        key = SigningKey.derive(SEED, uid, Role.TAMIYO, generation)
        key_ids.add(key.key_id)
        both = [
            ("kasmina", TAMIYO_PUBLIC, announced(SEED, uid, Role.TAMIYO, generation)),
            ("tamiyo", TAMIYO_PRIVATE, key.to_text()),
        ]
        for container, item, text in both if generation % 2 else reversed(both):
            mount(sidecars, container, item, text)
            exchange()
    assert kasmina.metric("esper_kasmina_command_verifier_accepted_total") == 1 + 2 * ROTATIONS
    boundary.close()
