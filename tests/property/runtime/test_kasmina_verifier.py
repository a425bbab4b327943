"""Kasmina under any order of boundaries, commands, replays, forgeries and time."""

from dataclasses import dataclass

import hypothesis.strategies as st
from esper_leyline.reasons import CommandRejection
from esper_leyline.signing import Role, SigningKey, Verifier, command_bytes, sign_command
from esper_leyline.v1.command_pb2 import AdaptationCommand, CommandType, DecisionMetadata, SignedCommand
from esper_runtime.kasmina.verifier import CommandVerifier
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

RUN = "run-1"
SEED = bytes(range(32))
KEY = SigningKey.derive(SEED, RUN, Role.TAMIYO)
STRANGER = SigningKey.derive(bytes(32), RUN, Role.TAMIYO)
WINDOW_NS = 100
CAPACITY = 12

NOTHING = CommandType.COMMAND_TYPE_NO_OPERATION


@dataclass(frozen=True)
class Made:
    signed: SignedCommand
    command_id: str
    packet_id: str


def made(key: SigningKey, packet_id: str, command_id: str) -> Made:
    metadata = DecisionMetadata(training_run_id=RUN, packet_id=packet_id)
    command = AdaptationCommand(version=1, command_id=command_id, command_type=NOTHING, metadata=metadata)
    return Made(sign_command(command, run_uid=RUN, key=key), command_id, packet_id)


class KasminaMachine(RuleBasedStateMachine):
    """A model that remembers everything for ever judges a verifier that may not."""

    packets = Bundle("packets")
    commands = Bundle("commands")

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0
        self.opened: dict[str, int] = {}
        self.accepted: list[tuple[str, str, int]] = []
        """command id, packet id, time"""

    @initialize()
    def start(self) -> None:
        self.verifier = CommandVerifier(
            run_uid=RUN,
            keys=Verifier.from_text(KEY.public_text()),
            clock_ns=lambda: self.now_ns,
            window_ns=WINDOW_NS,
            max_nonces=CAPACITY,
        )

    @rule(target=packets)
    def open_boundary(self) -> str:
        packet_id = self.verifier.open_boundary()
        self.opened[packet_id] = self.now_ns
        return packet_id

    @rule(elapsed_ns=st.integers(0, WINDOW_NS + 20))
    def time_passes(self, elapsed_ns: int) -> None:
        self.now_ns += elapsed_ns

    @rule(target=commands, packet=packets, number=st.integers(0, 30))
    def tamiyo_signs(self, packet: str, number: int) -> Made:
        return made(KEY, packet, f"c-{number}")

    @rule(target=commands, number=st.integers(0, 30))
    def tamiyo_signs_for_no_boundary(self, number: int) -> Made:
        return made(KEY, "00" * 16, f"c-{number}")

    @rule(command=commands)
    def submit(self, command: Made) -> None:
        """Once, twice, in any order: `commands` keeps what was submitted."""
        self._judge(command)

    @rule(command=consumes(commands))
    def submit_and_lose(self, command: Made) -> None:
        self._judge(command)

    @rule(packet=packets, number=st.integers(0, 30))
    def a_stranger_signs(self, packet: str, number: int) -> None:
        assert self.verifier.submit(made(STRANGER, packet, f"c-{number}").signed).rejection == "unknown_key_id"

    @rule()
    def restart(self) -> None:
        """What was opened before means nothing to the next process."""
        self.opened.clear()
        self.start()

    @invariant()
    def the_ledger_is_bounded(self) -> None:
        assert self.verifier.remembered_nonces <= CAPACITY

    def _judge(self, command: Made) -> None:
        rejection = self.verifier.submit(command.signed).rejection
        opened_ns = self.opened.get(command.packet_id)
        recently = {one for one, _, when in self.accepted if self.now_ns - when <= WINDOW_NS}
        if opened_ns is None:
            assert rejection == CommandRejection.UNKNOWN_PACKET
        elif self.now_ns - opened_ns > WINDOW_NS:
            assert rejection == CommandRejection.STALE_COMMAND
        elif rejection is None:
            assert command.command_id not in recently
            self.accepted.append((command.command_id, command.packet_id, self.now_ns))
        elif rejection == CommandRejection.NONCE_REPLAYED:
            assert command.command_id in {one for one, _, _ in self.accepted}
        else:
            assert rejection == CommandRejection.NONCE_LEDGER_FULL
            assert 2 * len(recently) > CAPACITY - 2


KasminaMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestKasmina = KasminaMachine.TestCase


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_is_accepted(data: st.DataObject) -> None:
    verifier = CommandVerifier(run_uid=RUN, keys=Verifier.from_text(KEY.public_text()), clock_ns=lambda: 0)
    honest = made(KEY, verifier.open_boundary(), "c-1").signed
    part = data.draw(st.sampled_from(["command", "signature", "nonce"]))
    forged = SignedCommand.FromString(honest.SerializeToString())
    if part == "nonce":
        forged.security.nonce = data.draw(st.text(max_size=40).filter(lambda text: text != honest.security.nonce))
    else:
        raw = bytearray(forged.command if part == "command" else forged.security.signature)
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
        if part == "command":
            forged.command = bytes(raw)
        else:
            forged.security.signature = bytes(raw)
    assert verifier.submit(forged).rejection == CommandRejection.INVALID_SIGNATURE
    assert verifier.submit(honest).accepted


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200), nonce=st.text(max_size=80))
def test_any_signed_bytes_give_a_verdict(raw: bytes, nonce: str) -> None:
    verifier = CommandVerifier(run_uid=RUN, keys=Verifier.from_text(KEY.public_text()), clock_ns=lambda: 0)
    signed = SignedCommand(command=raw)
    signed.security.nonce, signed.security.key_id = nonce, KEY.key_id
    signed.security.signature = KEY.private.sign(command_bytes(raw, signed.security, RUN))
    assert not verifier.submit(signed).accepted


FAULTS = (
    ("missing_signature", "signature"),
    ("wrong_run", "run"),
    ("missing_command_id", "id"),
    ("unknown_packet", "packet"),
)


@given(broken=st.sets(st.sampled_from([fault for _, fault in FAULTS]), min_size=1))
def test_the_first_check_that_fails_is_the_verdict(broken: set[str]) -> None:
    verifier = CommandVerifier(run_uid=RUN, keys=Verifier.from_text(KEY.public_text()), clock_ns=lambda: 0)
    packet_id = verifier.open_boundary()
    metadata = DecisionMetadata(
        training_run_id="run-2" if "run" in broken else RUN,
        packet_id="none" if "packet" in broken else packet_id,
    )
    command_id = "" if "id" in broken else "c"
    command = AdaptationCommand(version=1, command_id=command_id, command_type=NOTHING, metadata=metadata)
    signed = sign_command(command, run_uid=RUN, key=KEY)
    if "signature" in broken:
        signed.security.ClearField("signature")
    assert verifier.submit(signed).rejection == next(reason for reason, fault in FAULTS if fault in broken)
