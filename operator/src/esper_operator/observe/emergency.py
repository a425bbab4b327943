"""Emergency records: ConfigMap esper-emergency (broadcasts) and <run>-emergency (the last signal sent)."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import yaml
from esper_leyline.paths import EMERGENCY_SIGNAL
from esper_leyline.phases import EmergencyStop, HaltSource
from esper_leyline.signing import SignatureError, Verifier
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.emergency_pb2 import EmergencyMode, EmergencySignal, EmergencySource
from google.protobuf.message import DecodeError

from esper_operator.model import Broadcast, Problem, Run, SignalRecord
from esper_operator.observe import raw as read
from esper_operator.observe.selector import matches

MAX_BROADCAST_BYTES = 16 * 1024
MAX_REASON = 256
_KEYS = frozenset({"mode", "selector", "namespaces", "reason"})
_MODES = {
    EmergencyMode.EMERGENCY_MODE_FREEZE: EmergencyStop.FREEZE,
    EmergencyMode.EMERGENCY_MODE_CHECKPOINT: EmergencyStop.CHECKPOINT,
    EmergencyMode.EMERGENCY_MODE_KILL: EmergencyStop.KILL,
}
_SOURCES = {
    EmergencySource.EMERGENCY_SOURCE_BROADCAST: HaltSource.BROADCAST,
    EmergencySource.EMERGENCY_SOURCE_RUNTIME: HaltSource.RUNTIME,
    EmergencySource.EMERGENCY_SOURCE_BUDGET: HaltSource.BUDGET,
}


def broadcasts(config_map: Any, run: Run) -> tuple[tuple[Broadcast, ...], tuple[Problem, ...]]:
    """The broadcasts that match `run`, and what is wrong with the keys that do not parse; they harm no others."""
    found, problems = [], []
    for key, text in sorted(read.strings(config_map, "data").items()):
        try:
            broadcast = _broadcast(key, text, run)
        except ValueError as error:
            problems.append(Problem(f"data.{key}", str(error)))
        else:
            found += [broadcast] if broadcast is not None else []
    return tuple(found), tuple(problems)


def signal_record(config_map: Any, verifier: Verifier | None = None) -> SignalRecord | None:
    """The last signal in <run>-emergency. None when there is none, or none that `verifier` accepts."""
    text = read.text(config_map, "data", EMERGENCY_SIGNAL)
    try:
        envelope = BusEnvelope.FromString(base64.b64decode(text.strip(), validate=True))
        if verifier is not None:
            verifier.check_envelope(envelope)
        signal = EmergencySignal.FromString(envelope.payload)
    except (ValueError, binascii.Error, DecodeError, SignatureError):
        return None  # forged or broken: as if nothing had been sent, so that the next signal replaces it
    mode = _MODES.get(signal.mode)
    if mode is None or not signal.signal_id:
        return None
    return SignalRecord(
        term=signal.term,
        seq=signal.seq,
        signal_id=signal.signal_id,
        mode=mode,
        source=_SOURCES.get(signal.source, HaltSource.SPEC),
        attempt=signal.attempt,
        clear=signal.clear,
    )


def _broadcast(key: str, text: str, run: Run) -> Broadcast | None:
    """None when it does not match `run`. ValueError says what is wrong."""
    document = _document(text)
    mode = document.get("mode")
    if mode not in (EmergencyStop.FREEZE, EmergencyStop.CHECKPOINT, EmergencyStop.KILL):
        raise ValueError(
            f"mode is {mode!r:.64}; write Freeze, Checkpoint or Kill (to lift a broadcast, remove its key)"
        )
    namespaces = document.get("namespaces") or []
    if not isinstance(namespaces, list) or not all(isinstance(name, str) for name in namespaces):
        raise ValueError("namespaces must be a list of names; leave it out for all namespaces")
    if "selector" not in document:
        raise ValueError("selector is missing; write 'selector: {}' to select every run")
    selected = matches(document["selector"], run.labels)
    if not selected or (namespaces and run.key.namespace not in namespaces):
        return None
    return Broadcast(id=key, mode=EmergencyStop(mode), reason=str(document.get("reason") or "")[:MAX_REASON])


def _document(text: str) -> Mapping[str, Any]:
    if len(text) > MAX_BROADCAST_BYTES:
        raise ValueError(f"has {len(text)} characters; at most {MAX_BROADCAST_BYTES} are allowed")
    try:
        document = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is no YAML: {str(error)[:200]}") from error
    if not isinstance(document, Mapping):
        raise ValueError("must be a mapping with mode, selector, namespaces and reason")
    unknown = sorted(str(name) for name in document if name not in _KEYS)
    if unknown:
        raise ValueError(f"has the unknown key '{unknown[0][:64]}'; known are {', '.join(sorted(_KEYS))}")
    return document
