"""Which emergency signal counts: the pure gate between two untrusted ways in and the emergency page.

A signal counts by the operator's signature, for this run and attempt, when its (term, seq) is greater than that of
the last one. Each signal comes by two ways, so an equal one is the same signal again and an older one is late, unless
that way had already delivered a newer one: then somebody plays it back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from esper_leyline import contracts
from esper_leyline.oona import Entry
from esper_leyline.pages import EmergencyRecord
from esper_leyline.reasons import SignalRejection
from esper_leyline.signing import SignatureError, Verifier
from esper_leyline.v1.common_pb2 import BusMessageType
from esper_leyline.v1.emergency_pb2 import EmergencyMode, EmergencySignal
from google.protobuf.message import DecodeError

_MODES: Final = frozenset(
    {
        EmergencyMode.EMERGENCY_MODE_FREEZE,
        EmergencyMode.EMERGENCY_MODE_CHECKPOINT,
        EmergencyMode.EMERGENCY_MODE_KILL,
    }
)


MAX_SIGNAL_BYTES: Final = 4096
"""Of an envelope; a signal's texts are far shorter. Larger ones are not looked into."""


@dataclass(frozen=True, slots=True)
class Accepted:
    record: EmergencyRecord


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The last signal again, or an older one that was slower on this way."""

    order: int


@dataclass(frozen=True, slots=True)
class Rejected:
    reason: SignalRejection


Verdict = Accepted | Duplicate | Rejected


@dataclass(frozen=True, kw_only=True, slots=True)
class GateState:
    """What the gate remembers; survives a restart."""

    last: EmergencyRecord | None = None
    by_leg: Mapping[str, int] = field(default_factory=dict)
    """Greatest order that came by each way."""


class SignalGate:
    def __init__(self, *, run_uid: str, attempt: int, verifier: Verifier, state: GateState | None = None) -> None:
        self._run_uid = run_uid
        self._attempt = attempt
        self._verifier = verifier
        self.state = state or GateState()

    def judge(self, raw: bytes, leg: str, arrived_ns: int) -> Verdict:
        """The verdict on one received envelope; an accepted signal is remembered as the last."""
        found = self._verified(raw)
        if isinstance(found, SignalRejection):
            return Rejected(found)
        record = _record(found, arrived_ns)
        if record is None:
            return Rejected(SignalRejection.MALFORMED)
        last, newest_here = self.state.last, self.state.by_leg.get(leg, 0)
        if record.order < newest_here or (
            last is not None and record.order == last.order and record.signal_id != last.signal_id
        ):
            return Rejected(SignalRejection.REPLAYED)
        self.state = replace(self.state, by_leg={**self.state.by_leg, leg: record.order})
        if record.attempt not in (0, self._attempt):
            return Rejected(SignalRejection.WRONG_ATTEMPT)
        if last is not None and record.order <= last.order:
            return Duplicate(record.order)
        self.state = replace(self.state, last=record)
        return Accepted(record)

    def _verified(self, raw: bytes) -> EmergencySignal | SignalRejection:
        """The signal inside, once its signature is known to be the operator's and its run ours."""
        envelope = Entry("", raw).envelope() if len(raw) <= MAX_SIGNAL_BYTES else None
        if envelope is None:
            return SignalRejection.MALFORMED
        try:
            self._verifier.check_envelope(envelope)
        except SignatureError as error:
            return SignalRejection(error.reason)
        signal = EmergencySignal()
        try:
            signal.ParseFromString(envelope.payload)
        except DecodeError:
            return SignalRejection.MALFORMED
        if envelope.message_type != BusMessageType.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL:
            return SignalRejection.MALFORMED
        try:
            contracts.check(signal)
        except contracts.ContractError as error:
            return SignalRejection.WRONG_VERSION if error.wrong_version else SignalRejection.MALFORMED
        if envelope.run_uid != self._run_uid or signal.run_uid != self._run_uid:
            return SignalRejection.WRONG_RUN
        return signal


def _record(signal: EmergencySignal, arrived_ns: int) -> EmergencyRecord | None:
    """The signal as the page carries it; None when it does not fit."""
    try:
        whole_id = len(bytes.fromhex(signal.signal_id)) == 16 and len(signal.signal_id) == 32
    except ValueError:
        whole_id = False
    if not whole_id or not (signal.clear or signal.mode in _MODES):
        return None
    return EmergencyRecord(
        term=signal.term,
        seq=signal.seq,
        mode=signal.mode,
        clear=signal.clear,
        attempt=signal.attempt,
        signal_id=signal.signal_id.lower(),
        arrived_ns=arrived_ns,
        source=signal.source,
    )
