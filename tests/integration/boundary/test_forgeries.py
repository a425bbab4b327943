"""Commands of Tamiyo as somebody without its key may send them to Kasmina's socket: none acts, each is counted."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from esper_leyline.reasons import CommandRejection
from esper_leyline.signing import Role, SigningKey, sign_command
from esper_leyline.v1.command_pb2 import (
    AdaptationCommand,
    CommandType,
    CommandVerdict,
    DecisionMetadata,
    OpenBoundaryRequest,
    SignedCommand,
)
from esper_leyline.v1.command_pb2_grpc import KasminaAuthorityServiceStub
from google.protobuf.message import DecodeError

from tests.support.forgeries import OTHER_RUN, STRANGER, flipped, truncated
from tests.support.sidecars import SEED, Sidecar, Sidecars
from tests.support.waiting import PATIENT_S

SUBMIT = "/esper_leyline.v1.KasminaAuthorityService/SubmitCommand"
EACH = 50
"""Forgeries between two good commands."""


class Trainer:
    """The one who calls Kasmina; what it is given to pass on need not be Tamiyo's."""

    def __init__(self, channel: grpc.Channel, sidecars: Sidecars) -> None:
        self._authority: Any = KasminaAuthorityServiceStub(channel)  # type: ignore[no-untyped-call]
        self._submit = channel.unary_unary(SUBMIT, response_deserializer=CommandVerdict.FromString)
        self._sidecars = sidecars
        self.outcomes: Counter[str] = Counter()

    def open(self) -> str:
        request = OpenBoundaryRequest(run_uid=self._sidecars.run_uid)
        return str(self._authority.OpenBoundary(request, timeout=PATIENT_S, wait_for_ready=True).packet_id)

    def signed(self, packet_id: str, name: str, key: SigningKey | None = None, run_uid: str = "") -> SignedCommand:
        run_uid = run_uid or self._sidecars.run_uid
        command = AdaptationCommand(
            version=1,
            command_id=name,
            command_type=CommandType.COMMAND_TYPE_NO_OPERATION,
            metadata=DecisionMetadata(training_run_id=run_uid, packet_id=packet_id),
        )
        return sign_command(command, run_uid=run_uid, key=key or self._sidecars.key)

    def submit(self, raw: bytes) -> bool:
        try:
            verdict = self._submit(raw, timeout=PATIENT_S, wait_for_ready=True)
        except grpc.RpcError:  # no SignedCommand at all: gRPC refuses it
            self.outcomes["undecodable"] += 1
            return False
        self.outcomes["accepted" if verdict.accepted else verdict.reason] += 1
        return bool(verdict.accepted)

    def forgeries(self, good: SignedCommand, spent: list[SignedCommand]) -> Iterator[bytes]:
        """`good` is fresh and new; its changes have all else that a command needs. `spent` were accepted."""
        packet_id, name = self.open(), "forged"
        run_uid, own = self._sidecars.run_uid, self._sidecars.key
        for key in (
            SigningKey.derive(STRANGER, run_uid, Role.TAMIYO),
            SigningKey.derive(SEED, OTHER_RUN, Role.TAMIYO),
            SigningKey.derive(SEED, run_uid, Role.REPORT),
            SigningKey.derive(SEED, run_uid, Role.OPERATOR),
        ):
            yield self.signed(packet_id, name, key).SerializeToString()
            claimed = self.signed(packet_id, name, SigningKey(key.private, own.key_id))
            yield claimed.SerializeToString()
        yield self.signed(packet_id, name, run_uid=OTHER_RUN).SerializeToString()  # Tamiyo's, and of another run
        yield self.signed("0" * 32, name).SerializeToString()  # Tamiyo's, and of no boundary
        for one in spent:
            yield one.SerializeToString()
            yield SignedCommand(command=one.command, security=good.security).SerializeToString()
        raw = good.SerializeToString()
        yield from truncated(raw)
        for changed in flipped(raw, bits=(0, 7)):
            if not same(changed, good):
                yield changed


def same(raw: bytes, good: SignedCommand) -> bool:
    """Only a field was changed that nobody knows."""
    try:
        found = SignedCommand.FromString(raw)
    except DecodeError:
        return False
    return found.command == good.command and found.security == good.security


@pytest.mark.row("T07", "K28")
def test_of_hundreds_of_forged_commands_none_acts_and_every_good_one_does_once(sidecars: Sidecars) -> None:
    kasmina = sidecars.start("kasmina")
    with grpc.insecure_channel(f"unix:{kasmina.socket}") as channel:
        trainer = Trainer(channel, sidecars)
        spent: list[SignedCommand] = []
        for n in range(3):
            spent.append(trainer.signed(trainer.open(), f"c-{n}"))
            assert trainer.submit(spent[-1].SerializeToString())
        good = trainer.signed(trainer.open(), "withheld")
        for number, forged in enumerate(trainer.forgeries(good, spent), start=1):
            assert not trainer.submit(forged), forged
            if number % EACH == 0:
                assert trainer.submit(trainer.signed(trainer.open(), f"between-{number}").SerializeToString())
        again = trainer.signed(trainer.open(), "withheld").SerializeToString()  # the forged ones have not used it up
        assert trainer.submit(again)
        assert not trainer.submit(again)
    refused = {reason: trainer.outcomes[reason] for reason in CommandRejection if trainer.outcomes[reason]}
    print(f"{sum(refused.values()) + trainer.outcomes['undecodable']} forgeries refused: {dict(trainer.outcomes)}")
    assert counted(kasmina) == {"accepted": trainer.outcomes["accepted"], **refused}
    assert {"invalid_signature", "unknown_key_id", "missing_signature", "nonce_replayed"} <= set(refused)
    judged = sum(refused.values()) + trainer.outcomes["accepted"]
    assert kasmina.metric("esper_kasmina_command_verifier_validation_seconds_count") == judged
    assert 0 < kasmina.metric("esper_kasmina_command_verifier_validation_latency_ms") < 1000
    assert 2 <= kasmina.metric("esper_kasmina_nonce_ledger_size") <= 2 * trainer.outcomes["accepted"]


def counted(kasmina: Sidecar) -> dict[str, float]:
    name = "esper_kasmina_command_verifier"
    found = {str(r): kasmina.metric(f'{name}_rejections_total{{reason="{r}"}}') for r in CommandRejection}
    return {
        "accepted": kasmina.metric(f"{name}_accepted_total"),
        **{reason: count for reason, count in found.items() if count},
    }
