"""Keys and signatures: what they cover, whom they tell apart, how they rotate."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from esper_leyline import signing
from esper_leyline.signing import Role, SignatureError, SigningKey, Verifier, seal, sign_command
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.command_pb2 import AdaptationCommand, SignedCommand
from esper_leyline.v1.common_pb2 import BusMessageType, MessagePriority

SEED = bytes(range(32))
RUN = "3f0c2a7e-0000-4000-8000-000000000001"
KEY = SigningKey.derive(SEED, RUN, Role.REPORT)


def verifier(*keys: SigningKey) -> Verifier:
    return Verifier.from_text("".join(key.public_text() for key in keys))


def reason(check: Callable[[], None]) -> str:
    with pytest.raises(SignatureError) as caught:
        check()
    return caught.value.reason


# --- keys ----------------------------------------------------------------------------------------------------


def test_a_derived_key_is_pinned() -> None:
    """A change here would lock every running pod out from its operator after an upgrade."""
    assert KEY.key_id == "b0b0c69151da8221"
    assert KEY.public_text() == "41f99fd525a5818da3e75b58678376723e39930c496724807ceb7e956e649f2e\n"


def test_keys_differ_by_seed_run_role_and_generation() -> None:
    seeds = (SEED, bytes(32), SEED + b"\x00")
    keys = [
        SigningKey.derive(seed, run, role, generation).key_id
        for seed, run, role, generation in itertools.product(seeds, (RUN, "run-2", ""), Role, (1, 2, 11))
    ]
    assert len(set(keys)) == len(keys)


def test_run_role_and_generation_cannot_trade_places() -> None:
    ambiguous = [("a/1", 1), ("a", 1), ("a/1/1", 1), ("a", 11), ("a/1", 11)]
    assert len({SigningKey.derive(SEED, run, Role.TAMIYO, number).key_id for run, number in ambiguous}) == 5


def test_a_short_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="the key seed has 31 bytes; at least 32 are needed"):
        SigningKey.derive(bytes(31), RUN, Role.OPERATOR)


def test_a_key_survives_its_file() -> None:
    again = SigningKey.from_text(KEY.to_text())
    assert again.key_id == KEY.key_id
    assert again.public_text() == KEY.public_text()


def test_a_private_key_is_not_in_its_repr() -> None:
    assert KEY.to_text().strip() not in repr(KEY)


@pytest.mark.parametrize("text", ["", "zz" * 32, "ab" * 31, "ab" * 33])
def test_a_malformed_key_file_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        SigningKey.from_text(text)
    with pytest.raises(ValueError):
        Verifier.from_text(text)


def test_each_container_mounts_its_own_items_and_the_trainer_none() -> None:
    assert signing.KEY_ITEMS == {
        "weatherlight": ("report.key", "operator.pub"),
        "kasmina": ("tamiyo.pub",),
        "tamiyo": ("tamiyo.key",),
    }


# --- envelopes -----------------------------------------------------------------------------------------------


def sealed(payload: bytes = b"payload", **options: Any) -> BusEnvelope:
    kind = options.pop("message_type", BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT)
    return seal(payload, kind, run_uid=RUN, key=KEY, **options)


def test_a_sealed_envelope_verifies_after_the_wire() -> None:
    envelope = sealed(priority=MessagePriority.MESSAGE_PRIORITY_HIGH, correlation_id="c")
    verifier(KEY).check_envelope(BusEnvelope.FromString(envelope.SerializeToString()))
    assert len(envelope.nonce) == 16
    assert envelope.nonce != sealed().nonce


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("message_type", BusMessageType.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL, "invalid_signature"),
        ("payload", b"payloae", "invalid_signature"),
        ("payload", b"", "invalid_signature"),
        ("nonce", bytes(16), "invalid_signature"),
        ("nonce", b"", "invalid_signature"),
        ("run_uid", "run-2", "invalid_signature"),
        ("key_id", "0" * 16, "unknown_key_id"),
        ("key_id", "", "unknown_key_id"),
        ("signature", b"", "missing_signature"),
        ("signature", bytes(64), "invalid_signature"),
        ("signature", b"short", "invalid_signature"),
    ],
)
def test_every_field_that_decides_how_an_envelope_is_read_is_covered(field: str, value: Any, expected: str) -> None:
    envelope = sealed()
    setattr(envelope, field, value)
    assert reason(lambda: verifier(KEY).check_envelope(envelope)) == expected


def test_what_a_relay_may_change_is_not_covered() -> None:
    """And nothing else: a new field of the envelope must be put on one side or the other."""
    free = {"priority", "issued_at", "delivery_attempt", "correlation_id"}
    covered = {"message_type", "payload", "nonce", "run_uid", "key_id", "signature"}
    assert {field.name for field in BusEnvelope.DESCRIPTOR.fields} == free | covered
    envelope = sealed()
    envelope.priority = MessagePriority.MESSAGE_PRIORITY_LOW
    envelope.issued_at.FromSeconds(1)
    envelope.delivery_attempt = 3
    envelope.correlation_id = "other"
    verifier(KEY).check_envelope(envelope)


def test_bytes_cannot_move_between_neighbouring_fields() -> None:
    envelope = sealed(b"ab")
    envelope.payload = b"b"
    envelope.nonce = envelope.nonce + b"a"
    assert reason(lambda: verifier(KEY).check_envelope(envelope)) == "invalid_signature"


def test_a_payload_beyond_the_limit_is_not_sealed() -> None:
    sealed(bytes(signing.MAX_PAYLOAD))
    with pytest.raises(ValueError, match="payload of 262145 bytes; at most 262144"):
        sealed(bytes(signing.MAX_PAYLOAD + 1))


# --- commands ------------------------------------------------------------------------------------------------


def signed(**options: Any) -> SignedCommand:
    return sign_command(AdaptationCommand(version=1, command_id="c"), run_uid=RUN, key=KEY, **options)


def test_a_signed_command_verifies_for_its_run_only() -> None:
    verifier(KEY).check_command(SignedCommand.FromString(signed().SerializeToString()), RUN)
    assert reason(lambda: verifier(KEY).check_command(signed(), "run-2")) == "invalid_signature"


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (lambda s: setattr(s, "command", s.command[:-1]), "invalid_signature"),
        (lambda s: setattr(s.security, "nonce", "x"), "invalid_signature"),
        (lambda s: s.security.issued_at.FromSeconds(1), "invalid_signature"),
        (lambda s: s.security.ClearField("issued_at"), "invalid_signature"),
        (lambda s: s.security.freshness_window.FromSeconds(60), "invalid_signature"),
        (lambda s: s.security.ClearField("freshness_window"), "invalid_signature"),
        (lambda s: setattr(s.security, "key_id", "0" * 16), "unknown_key_id"),
        (lambda s: s.security.ClearField("signature"), "missing_signature"),
        (lambda s: s.ClearField("security"), "missing_signature"),
    ],
)
def test_every_field_of_a_signed_command_is_covered(tamper: Callable[[SignedCommand], None], expected: str) -> None:
    command = signed(freshness_ms=5000)
    tamper(command)
    assert reason(lambda: verifier(KEY).check_command(command, RUN)) == expected


def test_an_envelopes_signature_is_none_for_a_command() -> None:
    """Each kind has its own domain."""
    command = signed()
    envelope = sealed(command.command)
    command.security.signature = envelope.signature
    assert reason(lambda: verifier(KEY).check_command(command, RUN)) == "invalid_signature"


# --- rotation ------------------------------------------------------------------------------------------------


def test_during_a_rotation_both_keys_count_and_afterwards_one() -> None:
    old, new = (SigningKey.derive(SEED, RUN, Role.REPORT, generation) for generation in (1, 2))
    both = verifier(old, new)
    for key in (old, new):
        both.check_envelope(seal(b"x", BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT, run_uid=RUN, key=key))
    late = seal(b"x", BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT, run_uid=RUN, key=old)
    assert reason(lambda: verifier(new).check_envelope(late)) == "unknown_key_id"


def test_another_key_under_a_known_id_does_not_count() -> None:
    stranger = SigningKey(Ed25519PrivateKey.generate(), KEY.key_id)
    forged = seal(b"x", BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT, run_uid=RUN, key=stranger)
    assert reason(lambda: verifier(KEY).check_envelope(forged)) == "invalid_signature"


def test_a_verifier_without_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one public key"):
        Verifier([])
