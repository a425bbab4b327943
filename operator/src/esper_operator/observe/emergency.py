"""Emergency records: ConfigMap esper-emergency (broadcasts) and <run>-emergency (the last signal sent)."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
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
from esper_operator.observe.selector import Term, holds, parse

MAX_BROADCAST_BYTES = 16 * 1024
MAX_REASON = 256
MAX_DEPTH = 8
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
    said, problems = _parsed(tuple(sorted(read.strings(config_map, "data").items())))
    return tuple(one.broadcast for one in said if one.selects(run)), problems


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
        time=_time(signal),
    )


def _time(signal: EmergencySignal) -> datetime | None:
    try:
        return signal.triggered_at.ToDatetime(UTC) if signal.HasField("triggered_at") else None
    except (ValueError, OverflowError):
        return None  # beyond the calendar


@dataclass(frozen=True, kw_only=True, slots=True)
class _Said:
    broadcast: Broadcast
    terms: tuple[Term, ...]
    namespaces: tuple[str, ...]
    """Empty: all."""

    def selects(self, run: Run) -> bool:
        inside = not self.namespaces or run.key.namespace in self.namespaces
        return inside and holds(self.terms, run.labels)


@lru_cache(maxsize=4)
def _parsed(data: tuple[tuple[str, str], ...]) -> tuple[tuple[_Said, ...], tuple[Problem, ...]]:
    """Asked for each run anew, and the same for all."""
    said, problems = [], []
    for key, text in data:
        try:
            said.append(_broadcast(key, text))
        except ValueError as error:
            problems.append(Problem(f"data.{key}", _sound(str(error))))
    return tuple(said), tuple(problems)


def _broadcast(key: str, text: str) -> _Said:
    """ValueError says what is wrong."""
    document = _document(text)
    mode, reason = document.get("mode"), document.get("reason") or ""
    if mode not in (EmergencyStop.FREEZE, EmergencyStop.CHECKPOINT, EmergencyStop.KILL):
        raise ValueError(
            f"mode is {mode!r:.64}; write Freeze, Checkpoint or Kill (to lift a broadcast, remove its key)"
        )
    if not isinstance(reason, str):
        raise ValueError("reason must be text")
    namespaces = document.get("namespaces") or []
    if not isinstance(namespaces, list) or not all(isinstance(name, str) for name in namespaces):
        raise ValueError("namespaces must be a list of names; leave it out for all namespaces")
    if "selector" not in document:
        raise ValueError("selector is missing; write 'selector: {}' to select every run")
    return _Said(
        broadcast=Broadcast(id=key, mode=EmergencyStop(mode), reason=_sound(reason)[:MAX_REASON]),
        terms=parse(document["selector"]),
        namespaces=tuple(namespaces),
    )


def _sound(text: str) -> str:
    """Escapes of YAML can write halves of characters, which no encoder takes: pairs are joined, others replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _Loader(yaml.BaseLoader):
    """Text, lists and mappings; no aliases, of which a few lines stand for gigabytes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("has an alias (*name), which is not allowed here")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _document(text: str) -> Mapping[str, Any]:
    if len(text) > MAX_BROADCAST_BYTES:
        raise ValueError(f"has {len(text)} characters; at most {MAX_BROADCAST_BYTES} are allowed")
    try:
        document = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, OverflowError) as error:  # the latter for characters that there cannot be
        raise ValueError(f"is no YAML: {str(error)[:200]}") from error
    if not isinstance(document, Mapping):
        raise ValueError("must be a mapping with mode, selector, namespaces and reason")
    unknown = sorted(str(name) for name in document if name not in _KEYS)
    if unknown:
        raise ValueError(f"has the unknown key '{unknown[0][:64]}'; known are {', '.join(sorted(_KEYS))}")
    return document
