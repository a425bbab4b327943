"""Kasmina's checks one by one, and their order."""

import pytest
from esper_leyline.reasons import CommandRejection
from esper_leyline.signing import Role, SigningKey, Verifier, command_bytes, sign_command
from esper_leyline.v1.command_pb2 import (
    AdaptationCommand,
    CommandSecurity,
    CommandType,
    DecisionMetadata,
    SignedCommand,
)
from esper_runtime.kasmina.verifier import (
    FRESHNESS_WINDOW_NS,
    MAX_COMMAND_BYTES,
    MAX_OPEN_PACKETS,
    CommandVerifier,
    Verdict,
)

RUN = "run-1"
SEED = bytes(range(32))
KEY = SigningKey.derive(SEED, RUN, Role.TAMIYO)
SECOND = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ns = 5 * SECOND

    def __call__(self) -> int:
        return self.now_ns


class Bench:
    """A verifier, its clock, and a Tamiyo with the right key."""

    def __init__(self, keys: tuple[SigningKey, ...] = (KEY,), **options: int) -> None:
        self.clock = Clock()
        text = "".join(key.public_text() for key in keys)
        self.verifier = CommandVerifier(run_uid=RUN, keys=Verifier.from_text(text), clock_ns=self.clock, **options)

    def open(self) -> str:
        return self.verifier.open_boundary()

    def submit(self, signed: SignedCommand) -> CommandRejection | None:
        return self.verifier.submit(signed).rejection


def command(packet_id: str, *, command_id: str = "c-1", run: str = RUN, version: int = 1) -> AdaptationCommand:
    metadata = DecisionMetadata(training_run_id=run, packet_id=packet_id)
    kind = CommandType.COMMAND_TYPE_NO_OPERATION
    return AdaptationCommand(version=version, command_id=command_id, command_type=kind, metadata=metadata)


def signed(packet_id: str, key: SigningKey = KEY, *, freshness_ms: int | None = None, **of: object) -> SignedCommand:
    return sign_command(command(packet_id, **of), run_uid=RUN, key=key, freshness_ms=freshness_ms)  # type: ignore[arg-type]


def resigned(raw: bytes, *, nonce: str = "n") -> SignedCommand:
    """Any bytes under a right signature."""
    security = CommandSecurity(nonce=nonce, key_id=KEY.key_id)
    security.signature = KEY.private.sign(command_bytes(raw, security, RUN))
    return SignedCommand(command=raw, security=security)


def test_a_sound_command_is_accepted_and_named() -> None:
    bench = Bench()
    verdict = bench.verifier.submit(signed(bench.open()))
    assert verdict == Verdict("c-1", None)
    assert verdict.accepted


def test_packet_ids_are_128_random_bits() -> None:
    bench = Bench()
    ids = {bench.open() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(bytes.fromhex(one)) == 16 for one in ids)


@pytest.mark.row("T07")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda s: s.security.ClearField("signature"), CommandRejection.MISSING_SIGNATURE),
        (lambda s: s.ClearField("security"), CommandRejection.MISSING_SIGNATURE),
        (lambda s: setattr(s.security, "key_id", "0" * 16), CommandRejection.UNKNOWN_KEY_ID),
        (lambda s: setattr(s.security, "signature", bytes(64)), CommandRejection.INVALID_SIGNATURE),
        (lambda s: setattr(s.security, "signature", b"short"), CommandRejection.INVALID_SIGNATURE),
        (lambda s: setattr(s.security, "nonce", "other"), CommandRejection.INVALID_SIGNATURE),
        (lambda s: setattr(s, "command", s.command + b"\x00"), CommandRejection.INVALID_SIGNATURE),
        (lambda s: s.security.freshness_window.FromSeconds(9), CommandRejection.INVALID_SIGNATURE),
    ],
)
def test_a_spoilt_signature_is_refused_and_nothing_of_the_command_repeated(spoil, reason) -> None:
    bench = Bench()
    forged = signed(bench.open())
    spoil(forged)
    assert bench.verifier.submit(forged) == Verdict("", reason)


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(resigned(b"\xff\xff\xff"), id="no protobuf"),
        pytest.param(resigned(command("p").SerializeToString(), nonce=""), id="no nonce"),
        pytest.param(resigned(command("p").SerializeToString(), nonce="n" * 65), id="giant nonce"),
        pytest.param(resigned(command("p", command_id="c" * 65).SerializeToString()), id="giant id"),
        pytest.param(resigned(command("p" * MAX_COMMAND_BYTES).SerializeToString()), id="giant command"),
    ],
)
def test_what_is_signed_but_no_command_is_malformed(made: SignedCommand) -> None:
    assert Bench().submit(made) == CommandRejection.MALFORMED


@pytest.mark.row("T34")
@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_a_command_of_another_version_is_refused_as_such(version: int) -> None:
    bench = Bench()
    made = resigned(command(bench.open(), version=version).SerializeToString())
    assert bench.submit(made) == CommandRejection.WRONG_VERSION


def test_a_command_about_another_run_is_refused_even_under_the_right_signature() -> None:
    bench = Bench()
    assert bench.submit(signed(bench.open(), run="run-2")) == CommandRejection.WRONG_RUN
    assert bench.submit(signed(bench.open(), run="")) == CommandRejection.WRONG_RUN


def test_a_key_of_another_run_or_role_is_unknown() -> None:
    bench = Bench()
    for key in (SigningKey.derive(SEED, "run-2", Role.TAMIYO), SigningKey.derive(SEED, RUN, Role.REPORT)):
        assert bench.submit(signed(bench.open(), key)) == CommandRejection.UNKNOWN_KEY_ID


def test_two_keys_are_active_during_a_rotation() -> None:
    old, new = (SigningKey.derive(SEED, RUN, Role.TAMIYO, generation) for generation in (1, 2))
    bench = Bench((old, new))
    assert bench.submit(signed(bench.open(), old, command_id="a")) is None
    assert bench.submit(signed(bench.open(), new, command_id="b")) is None
    assert Bench((new,)).submit(signed("p", old)) == CommandRejection.UNKNOWN_KEY_ID


@pytest.mark.row("T07")
def test_fresh_means_an_echo_of_a_packet_opened_within_the_window() -> None:
    bench = Bench()
    packet = bench.open()
    late, very_late = signed(packet, command_id="late"), signed(packet, command_id="very late")
    bench.clock.now_ns += FRESHNESS_WINDOW_NS
    assert bench.submit(late) is None
    bench.clock.now_ns += 1
    assert bench.submit(very_late) == CommandRejection.STALE_COMMAND
    assert bench.submit(signed("never opened")) == CommandRejection.UNKNOWN_PACKET
    assert bench.submit(signed("")) == CommandRejection.UNKNOWN_PACKET


@pytest.mark.parametrize(
    ("asked_ms", "age_s", "reason"),
    [
        (2000, 2, None),
        (2000, 3, CommandRejection.STALE_COMMAND),
        (60_000, 11, CommandRejection.STALE_COMMAND),  # the verifier's own limit wins
        (0, 0, None),
        (0, 1, CommandRejection.STALE_COMMAND),
        (-1, 0, CommandRejection.STALE_COMMAND),
    ],
)
def test_a_command_may_ask_for_a_shorter_window(asked_ms: int, age_s: int, reason: CommandRejection | None) -> None:
    bench = Bench()
    made = signed(bench.open(), freshness_ms=asked_ms)
    bench.clock.now_ns += age_s * SECOND
    assert bench.submit(made) == reason


@pytest.mark.row("T07")
def test_a_command_is_accepted_once_by_nonce_and_by_id() -> None:
    bench = Bench()
    packet = bench.open()
    made = signed(packet)
    assert bench.submit(made) is None
    assert bench.submit(made) == CommandRejection.NONCE_REPLAYED
    assert bench.submit(signed(packet)) == CommandRejection.NONCE_REPLAYED  # same id, new nonce
    assert bench.submit(signed(packet, command_id="c-2")) is None


def test_a_refused_command_does_not_burn_its_nonce() -> None:
    bench = Bench()
    packet = bench.open()
    bench.clock.now_ns += FRESHNESS_WINDOW_NS + 1
    assert bench.submit(signed(packet)) == CommandRejection.STALE_COMMAND
    assert bench.verifier.remembered_nonces == 0
    assert bench.submit(signed(bench.open())) is None


def test_a_full_ledger_refuses_the_new_and_forgets_nothing_that_is_fresh() -> None:
    bench = Bench(max_nonces=4)  # two ids per command
    packet = bench.open()
    first, second, third = (signed(packet, command_id=name) for name in "abc")
    assert [bench.submit(one) for one in (first, second)] == [None, None]
    assert bench.submit(third) == CommandRejection.NONCE_LEDGER_FULL
    assert bench.submit(first) == CommandRejection.NONCE_REPLAYED
    bench.clock.now_ns += FRESHNESS_WINDOW_NS + 1
    assert bench.submit(signed(bench.open(), command_id="d")) is None
    assert bench.verifier.remembered_nonces == 2


def test_forgotten_packets_refuse_and_memory_stays_bounded() -> None:
    bench = Bench()
    first = bench.open()
    for _ in range(MAX_OPEN_PACKETS):
        bench.open()
    assert bench.submit(signed(first)) == CommandRejection.UNKNOWN_PACKET
