"""Ed25519 keys per run and role, and signatures over the exact bytes carried.

One seed belongs to the operator; every key is derived from it (HKDF-SHA256 over role, run UID and generation), so
nothing needs to be stored but the seed. A key id is 16 hex digits of the public key's SHA-256.

Two keys of a role are active at any time. A public key file holds the key in force and the next one, one hex line
each, so that the first message under a new key finds pods that know it; when the file follows, the key before is
worth nothing. The operator, whom reports reach that were signed before a rotation, accepts the key in force and the
one before.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.command_pb2 import AdaptationCommand, CommandSecurity, SignedCommand
from esper_leyline.v1.common_pb2 import BusMessageType, MessagePriority

SEED_BYTES = 32
MAX_PAYLOAD = 256 * 1024
_DOMAIN = b"esper.leyline.v1\x00"


class Role(StrEnum):
    """Who signs: one key pair per run and direction."""

    OPERATOR = "operator"
    """Emergency signals, operator to pods."""
    REPORT = "report"
    """Run reports and acknowledgements, weatherlight to operator."""
    TAMIYO = "tamiyo"
    """Commands, Tamiyo to Kasmina."""


OPERATOR_PUBLIC = "operator.pub"
REPORT_PRIVATE = "report.key"
TAMIYO_PRIVATE = "tamiyo.key"
TAMIYO_PUBLIC = "tamiyo.pub"
KEY_ITEMS: dict[str, tuple[str, ...]] = {
    "weatherlight": (REPORT_PRIVATE, OPERATOR_PUBLIC),
    "kasmina": (TAMIYO_PUBLIC,),
    "tamiyo": (TAMIYO_PRIVATE,),
}
"""Items of the Secret <run>-keys that each container mounts. The trainer mounts none."""


class SignatureError(Exception):
    """A signature that does not count. `reason` is missing_signature, unknown_key_id or invalid_signature."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SigningKey:
    private: Ed25519PrivateKey
    key_id: str

    @classmethod
    def derive(cls, seed: bytes, run_uid: str, role: Role, generation: int = 1) -> "SigningKey":
        """The key of `role` in the run, from the operator's seed of at least 32 bytes."""
        return cls.of_bytes(_derived(seed, role, run_uid, generation))

    @classmethod
    def of_bytes(cls, raw: bytes) -> "SigningKey":
        private = Ed25519PrivateKey.from_private_bytes(raw)
        return cls(private, key_id_of(private.public_key()))

    @classmethod
    def from_text(cls, text: str) -> "SigningKey":
        """From a key file: 64 hex digits."""
        return cls.of_bytes(bytes.fromhex(text.strip()))

    def to_text(self) -> str:
        return self.private.private_bytes_raw().hex() + "\n"

    def public_text(self) -> str:
        return self.private.public_key().public_bytes_raw().hex() + "\n"


class Verifier:
    """Knows the public keys of one role of one run."""

    def __init__(self, keys: Iterable[Ed25519PublicKey]) -> None:
        self._keys = {key_id_of(key): key for key in keys}
        if not self._keys:
            raise ValueError("a verifier needs at least one public key")

    @classmethod
    def from_text(cls, text: str) -> "Verifier":
        """From a public key file: one hex line per active key."""
        return cls(Ed25519PublicKey.from_public_bytes(bytes.fromhex(line)) for line in text.split())

    @classmethod
    def derive(cls, seed: bytes, run_uid: str, role: Role, generation: int) -> "Verifier":
        """Of who receives what pods signed, and reads what was signed before a rotation."""
        known = (g for g in (generation, generation - 1) if g >= 1)
        return cls.from_text("".join(SigningKey.derive(seed, run_uid, role, g).public_text() for g in known))

    def check(self, key_id: str, signature: bytes, message: bytes) -> None:
        """SignatureError unless `signature` over `message` is by the key of that id."""
        if not signature:
            raise SignatureError("missing_signature")
        key = self._keys.get(key_id)
        if key is None:
            raise SignatureError("unknown_key_id")
        try:
            key.verify(signature, message)
        except InvalidSignature as error:
            raise SignatureError("invalid_signature") from error

    def check_envelope(self, envelope: BusEnvelope) -> None:
        self.check(envelope.key_id, envelope.signature, signed_bytes(envelope))

    def check_command(self, signed: SignedCommand, run_uid: str) -> None:
        security = signed.security
        self.check(security.key_id, security.signature, command_bytes(signed.command, security, run_uid))


def announced(seed: bytes, run_uid: str, role: Role, generation: int) -> str:
    """Content of a pod's public key file: the key in force, and the next."""
    active = (generation, generation + 1)
    return "".join(SigningKey.derive(seed, run_uid, role, g).public_text() for g in active)


def bus_password(seed: bytes, run_uid: str, generation: int = 1) -> str:
    """Of the run's own user in Redis: derived like its keys, so that nothing needs to be stored but the seed."""
    return _derived(seed, "bus", run_uid, generation).hex()


def _derived(seed: bytes, purpose: str, run_uid: str, generation: int) -> bytes:
    if len(seed) < SEED_BYTES:
        raise ValueError(f"the key seed has {len(seed)} bytes; at least {SEED_BYTES} are needed")
    info = _DOMAIN + f"{purpose}/{run_uid}/{generation}".encode()
    return HKDF(SHA256(), 32, salt=None, info=info).derive(seed)


def key_id_of(key: Ed25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def signed_bytes(envelope: BusEnvelope) -> bytes:
    """What an envelope's signature covers: everything that decides how it is read, and the payload as carried."""
    return _joined(
        b"envelope",
        int(envelope.message_type).to_bytes(4, "big"),
        envelope.run_uid.encode(),
        envelope.key_id.encode(),
        envelope.nonce,
        envelope.payload,
    )


def command_bytes(command: bytes, security: CommandSecurity, run_uid: str) -> bytes:
    """What a command's signature covers: the run, all of `security` but the signature, the command as carried."""
    return _joined(
        b"command",
        run_uid.encode(),
        security.key_id.encode(),
        security.nonce.encode(),
        _moment(security.issued_at if security.HasField("issued_at") else None),
        _moment(security.freshness_window if security.HasField("freshness_window") else None),
        command,
    )


def _moment(value: Timestamp | Duration | None) -> bytes:
    """Fixed bytes for a time; none for an absent one, which is not the same as zero."""
    return b"" if value is None else struct.pack(">qi", value.seconds, value.nanos)


def _joined(*parts: bytes) -> bytes:
    return _DOMAIN + b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def seal(
    payload: bytes,
    message_type: BusMessageType,
    *,
    run_uid: str,
    key: SigningKey,
    priority: MessagePriority = MessagePriority.MESSAGE_PRIORITY_NORMAL,
    correlation_id: str = "",
    nonce: bytes = b"",
) -> BusEnvelope:
    """A signed envelope around `payload`, at most 256 KiB. Give a `nonce` of 16 bytes to what may be sealed again and
    must then be the same message."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes; at most {MAX_PAYLOAD}")
    envelope = BusEnvelope(
        message_type=message_type,
        payload=payload,
        priority=priority,
        key_id=key.key_id,
        nonce=nonce or os.urandom(16),
        run_uid=run_uid,
        correlation_id=correlation_id,
    )
    envelope.issued_at.GetCurrentTime()
    envelope.signature = key.private.sign(signed_bytes(envelope))
    return envelope


def sign_command(
    command: AdaptationCommand, *, run_uid: str, key: SigningKey, freshness_ms: int | None = None
) -> SignedCommand:
    """Serializes once and signs those bytes. `freshness_ms` asks for a shorter window than the verifier's own."""
    raw = command.SerializeToString()
    security = CommandSecurity(nonce=os.urandom(16).hex(), key_id=key.key_id)
    security.issued_at.GetCurrentTime()
    if freshness_ms is not None:
        security.freshness_window.FromMilliseconds(freshness_ms)
    security.signature = key.private.sign(command_bytes(raw, security, run_uid))
    return SignedCommand(command=raw, security=security)
