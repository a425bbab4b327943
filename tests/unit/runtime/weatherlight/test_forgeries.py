"""Every change that somebody without the key can make to an order, one by one: none acts."""

from collections import Counter

import pytest
from esper_leyline.reasons import SignalRejection
from esper_leyline.signing import Role, Verifier
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.emergency_pb2 import EmergencySignal
from esper_runtime.weatherlight.signals import MAX_SIGNAL_BYTES, Accepted, Duplicate, Rejected, SignalGate

from tests.support.forgeries import changed, flipped, rewritten, same_meaning, signed_by, truncated, under_other_keys
from tests.support.weatherlight import SEED, UID, operator_key, sealed, signal_message

PODS = (Role.REPORT, Role.TAMIYO)
"""Roles whose private keys are in pods."""


class Gate:
    """Has seen signals 1 and 2; 3 is signed, and withheld by whoever holds Redis."""

    def __init__(self) -> None:
        self.gate = SignalGate(run_uid=UID, attempt=1, verifier=Verifier.from_text(operator_key().public_text()))
        self.withheld = sealed(signal_message(3))
        for seq in (1, 2):
            assert isinstance(self.judge(sealed(signal_message(seq)).SerializeToString()), Accepted)

    def judge(self, raw: bytes) -> object:
        return self.gate.judge(raw, "redis", 1)

    def refuses(self, *forgeries: bytes) -> Counter[str]:
        """By reason; the gate is as it was."""
        before, reasons = self.gate.state, Counter[str]()
        for raw in forgeries:
            verdict = self.judge(raw)
            assert isinstance(verdict, Rejected), raw
            reasons[verdict.reason] += 1
        assert self.gate.state == before
        return reasons

    def is_whole(self) -> bool:
        return isinstance(self.judge(self.withheld.SerializeToString()), Accepted)


@pytest.mark.row("T07")
def test_another_key_orders_nothing_whatever_it_says_of_itself() -> None:
    gate = Gate()
    forged = under_other_keys(gate.withheld, SEED, UID, PODS)
    reasons = gate.refuses(*(one.SerializeToString() for one in forged.values()))
    assert reasons == {"unknown_key_id": len(forged) / 2, "invalid_signature": len(forged) / 2}
    assert gate.is_whole()


@pytest.mark.row("T07")
def test_a_signature_orders_nothing_but_what_it_signed() -> None:
    gate = Gate()
    kill = signal_message(9, mode=3).SerializeToString()
    reasons = gate.refuses(*(one.SerializeToString() for one in rewritten(gate.withheld, kill).values()))
    assert set(reasons) == {"missing_signature", "unknown_key_id", "invalid_signature"}
    assert gate.is_whole()


@pytest.mark.row("T07")
def test_no_beginning_and_no_flipped_bit_of_an_order_acts() -> None:
    """Bits that the signature does not cover change nothing of the order: it is that order."""
    gate = Gate()
    raw = gate.withheld.SerializeToString()
    cut, bits = list(truncated(raw)), list(flipped(raw))
    harmless = [one for one in bits if same_meaning(one, gate.withheld)]
    reasons = gate.refuses(*cut, *(one for one in bits if one not in harmless))
    assert len(harmless) < len(bits) / 4
    for one in harmless:
        accepted = Gate().judge(one)
        assert isinstance(accepted, Accepted)
        assert accepted.record.seq == 3
    print(f"{len(cut)} beginnings and {len(bits) - len(harmless)} flipped bits refused: {dict(reasons)}")
    assert gate.is_whole()


@pytest.mark.row("T07")
def test_what_was_said_before_is_refused_or_nothing_new() -> None:
    gate = Gate()
    assert gate.refuses(*[sealed(signal_message(1)).SerializeToString()] * 5) == {"replayed": 5}
    again = sealed(signal_message(2)).SerializeToString()
    assert [gate.judge(again) for _ in range(5)] == [Duplicate(2)] * 5
    assert gate.is_whole()


@pytest.mark.row("T34")
@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_a_signal_of_another_version_is_refused_as_such(version: int) -> None:
    gate = Gate()
    assert gate.refuses(sealed(signal_message(4, version=version)).SerializeToString()) == {"wrong_version": 1}


def test_what_is_larger_than_any_signal_is_not_looked_into() -> None:
    gate = Gate()
    large = changed(
        gate.withheld, payload=signal_message(9).SerializeToString() + b"\xfa\x7f" + bytes(MAX_SIGNAL_BYTES)
    )
    signed = signed_by(large, operator_key()).SerializeToString()
    assert gate.refuses(signed, bytes(1 << 20)) == {SignalRejection.MALFORMED: 2}


@pytest.mark.parametrize("made", [b"", b"\x00", b"no envelope", EmergencySignal().SerializeToString()])
def test_what_is_no_envelope_is_malformed_or_unsigned(made: bytes) -> None:
    reasons = Gate().refuses(made)
    assert set(reasons) <= {"malformed", "missing_signature"}
    assert BusEnvelope().SerializeToString() == b""
