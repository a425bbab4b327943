"""The kasmina and tamiyo containers by themselves: sockets, keys, refusals, ends."""

import stat
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from esper_leyline.exitcodes import SidecarExit
from esper_leyline.reasons import CommandRejection
from esper_leyline.signing import Role, SigningKey, sign_command
from esper_leyline.v1.command_pb2 import (
    AdaptationCommand,
    CommandType,
    CommandVerdict,
    DecisionMetadata,
    OpenBoundaryRequest,
)
from esper_leyline.v1.command_pb2_grpc import KasminaAuthorityServiceStub, TamiyoPolicyServiceStub
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket

from tests.support.sidecars import SEED, Sidecar, Sidecars, wait_until
from tests.support.waiting import PATIENT_S


class Authority:
    """A client that signs with any key it likes."""

    def __init__(self, sidecar: Sidecar, sidecars: Sidecars) -> None:
        self.channel = grpc.insecure_channel(f"unix:{sidecar.socket}")
        self.stub: Any = KasminaAuthorityServiceStub(self.channel)
        self.run_uid = sidecars.run_uid
        self.key = sidecars.key

    def open(self) -> str:
        request = OpenBoundaryRequest(run_uid=self.run_uid)
        return str(self.stub.OpenBoundary(request, timeout=PATIENT_S, wait_for_ready=True).packet_id)

    def submit(
        self, packet_id: str, *, key: SigningKey | None = None, run_uid: str = "", command_id: str = "c"
    ) -> CommandVerdict:
        run_uid = run_uid or self.run_uid
        command = AdaptationCommand(
            version=1,
            command_id=command_id,
            command_type=CommandType.COMMAND_TYPE_NO_OPERATION,
            metadata=DecisionMetadata(training_run_id=run_uid, packet_id=packet_id),
        )
        self.sent = sign_command(command, run_uid=run_uid, key=key or self.key)
        return self.again()

    def again(self) -> CommandVerdict:
        return self.stub.SubmitCommand(self.sent, timeout=PATIENT_S, wait_for_ready=True)


@pytest.fixture
def kasmina(sidecars: Sidecars) -> Sidecar:
    return sidecars.start("kasmina")


@pytest.fixture
def authority(kasmina: Sidecar, sidecars: Sidecars) -> Iterator[Authority]:
    made = Authority(kasmina, sidecars)
    with made.channel:
        yield made


@pytest.mark.row("K63", "T07")
def test_kasmina_accepts_once_and_refuses_forgeries_replays_and_other_runs(
    authority: Authority, kasmina: Sidecar
) -> None:
    packet_id = authority.open()
    assert authority.submit(packet_id) == CommandVerdict(accepted=True, command_id="c")
    refused = {
        CommandRejection.NONCE_REPLAYED: authority.again(),
        CommandRejection.UNKNOWN_KEY_ID: authority.submit(
            packet_id, key=SigningKey.derive(SEED, "another-run", Role.TAMIYO), command_id="d"
        ),
        # Signed for another run: the run is part of the signed bytes.
        CommandRejection.INVALID_SIGNATURE: authority.submit(packet_id, run_uid="another-run", command_id="e"),
        CommandRejection.UNKNOWN_PACKET: authority.submit("0" * 32, command_id="f"),
    }
    for reason, verdict in refused.items():
        assert (verdict.accepted, verdict.reason) == (False, reason)
        metric = f'esper_kasmina_command_verifier_rejections_total{{reason="{reason}"}}'
        assert kasmina.metric(metric) == 1


@pytest.mark.row("K63", "T07")
def test_a_restarted_kasmina_refuses_everything_from_before(authority: Authority, kasmina: Sidecar) -> None:
    assert authority.submit(authority.open()).accepted
    dead = kasmina.worker()
    dead.kill()
    wait_until(lambda: not dead.is_running(), "the worker is dead")
    assert authority.again().reason == CommandRejection.UNKNOWN_PACKET
    assert authority.submit(authority.open(), command_id="d").accepted


def test_a_boundary_of_another_run_is_not_opened(authority: Authority) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        authority.stub.OpenBoundary(OpenBoundaryRequest(run_uid="another"), timeout=PATIENT_S)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "run_uid is 'another'" in caught.value.details()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"version": 2}, grpc.StatusCode.INVALID_ARGUMENT, "version is 2; it must be 1"),
        ({"training_run_id": "other"}, grpc.StatusCode.FAILED_PRECONDITION, "training_run_id is 'other'"),
        ({"packet_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "packet_id is missing"),
        ({"packet_id": "a" * 65}, grpc.StatusCode.INVALID_ARGUMENT, "packet_id has 65 bytes; at most 64"),
    ],
)
def test_tamiyo_refuses_what_it_cannot_answer(
    tamiyo_channel: grpc.Channel, sidecars: Sidecars, change: dict[str, Any], code: grpc.StatusCode, words: str
) -> None:
    fields = {"version": 1, "training_run_id": sidecars.run_uid, "packet_id": "a" * 32} | change
    with pytest.raises(grpc.RpcError) as caught:
        TamiyoPolicyServiceStub(tamiyo_channel).Evaluate(SystemStatePacket(**fields), timeout=PATIENT_S)  # type: ignore[no-untyped-call]
    assert caught.value.code() is code
    assert words in caught.value.details()


@pytest.fixture
def tamiyo_channel(sidecars: Sidecars) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{sidecars.start('tamiyo').socket}") as channel:
        yield channel


@pytest.mark.parametrize("name", ["kasmina", "tamiyo"])
def test_the_socket_is_for_the_group_and_goes_with_the_sidecar(sidecars: Sidecars, name: str) -> None:
    sidecar = sidecars.start(name)
    assert stat.S_IMODE(sidecar.socket.stat().st_mode) == 0o660
    assert sidecar.get("/livez")[0] == 200
    assert sidecar.stop() == 0
    assert not sidecar.socket.exists()


@pytest.mark.parametrize(
    ("name", "item", "content", "words"),
    [
        ("kasmina", "tamiyo.pub", None, "tamiyo.pub is missing; the operator mounts it from the Secret <run>-keys"),
        ("kasmina", "tamiyo.pub", "zz\n", "tamiyo.pub holds no public keys, one of 64 hex digits a line"),
        ("kasmina", "tamiyo.pub", "", "tamiyo.pub holds no public keys"),
        ("tamiyo", "tamiyo.key", None, "tamiyo.key is missing; the operator mounts it from the Secret <run>-keys"),
        ("tamiyo", "tamiyo.key", "abcdef", "tamiyo.key holds no private key of 64 hex digits"),
    ],
)
def test_an_unusable_key_ends_the_container_with_words(
    sidecars: Sidecars, name: str, item: str, content: str | None, words: str
) -> None:
    path = sidecars.directory / "keys" / name / item
    path.unlink() if content is None else path.write_text(content)
    sidecar = sidecars.start(name, ready=False)
    assert sidecar.process.wait(timeout=PATIENT_S) == SidecarExit.KEY
    log = sidecar.log.read_text()
    assert words in log
    assert "abcdef" not in log  # a private key's text is never repeated
    assert "Traceback" not in log


def test_something_else_at_the_sockets_place_is_named(sidecars: Sidecars) -> None:
    (sidecars.run_dir / "kasmina.sock").write_text("mine")
    sidecar = sidecars.start("kasmina", ready=False)
    assert sidecar.process.wait(timeout=PATIENT_S) == SidecarExit.CONFIG
    assert "kasmina.sock is in the way and no socket; remove it" in sidecar.log.read_text()
    assert (sidecars.run_dir / "kasmina.sock").read_text() == "mine"


@pytest.mark.parametrize("name", ["kasmina", "tamiyo"])
def test_a_sidecar_needs_no_torch(name: str) -> None:
    code = f"import sys, esper_runtime.{name}.worker; assert not {{'torch', 'numpy', 'redis'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENT_S)
