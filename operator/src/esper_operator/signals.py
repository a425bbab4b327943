"""Emergency signals on their way out: signed, numbered, by Redis and by ConfigMap at the same time.

The number of a signal is the last one in ConfigMap `<run>-emergency` plus one, written with that ConfigMap's resource
version; its id is derived from the number it follows. So a signal that is sent again after a crash or a lost answer
is the same signal, not a second one. A ConfigMap that somebody deleted or emptied is made again, and numbers go on from
what this process or the run's status remembers.
"""

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from esper_leyline.labels import MANAGED_BY, SIGNAL, emergency_config_map_name
from esper_leyline.oona import Outcome, Status
from esper_leyline.paths import EMERGENCY_SIGNAL
from esper_leyline.phases import EmergencyStop, HaltSource, Phase
from esper_leyline.signing import Role, SigningKey, Verifier, seal
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType, MessagePriority
from esper_leyline.v1.emergency_pb2 import EmergencyLevel, EmergencyMode, EmergencySignal, EmergencySource

from esper_operator.build.config import emergency as empty_ledger
from esper_operator.kube.api import CONFIG_MAPS, PODS, KubeApi, Object
from esper_operator.kube.errors import AlreadyExists, Conflict, KubeError, NotFound
from esper_operator.model import Pod, Run, SignalOrder, SignalRecord
from esper_operator.observe import signal_record
from esper_operator.observe.halting import in_force

logger = logging.getLogger(__name__)

BUS_PATIENCE_S = 0.25
MAX_REASON_BYTES = 256
CONFLICT_RETRIES = 3
_SIGNAL_ID = re.compile("[0-9a-f]{32}")

Publish = Callable[[str, BusEnvelope], Awaitable[Outcome]]
"""(run UID, envelope); never raises for any state of Redis."""

MODES = {
    EmergencyStop.FREEZE: EmergencyMode.EMERGENCY_MODE_FREEZE,
    EmergencyStop.CHECKPOINT: EmergencyMode.EMERGENCY_MODE_CHECKPOINT,
    EmergencyStop.KILL: EmergencyMode.EMERGENCY_MODE_KILL,
}
SOURCES = {
    HaltSource.SPEC: EmergencySource.EMERGENCY_SOURCE_SPEC,
    HaltSource.BROADCAST: EmergencySource.EMERGENCY_SOURCE_BROADCAST,
    HaltSource.RUNTIME: EmergencySource.EMERGENCY_SOURCE_RUNTIME,
    HaltSource.BUDGET: EmergencySource.EMERGENCY_SOURCE_BUDGET,
}


@dataclass(frozen=True, slots=True)
class _Ledger:
    """What `<run>-emergency` says."""

    record: SignalRecord | None
    version: str
    """Of the ConfigMap; empty when there is none."""


class Signals:
    def __init__(
        self,
        api: KubeApi,
        *,
        seed: bytes,
        generation: int,
        term: Callable[[], int],
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
        publish: Publish | None = None,
        on_leg: Callable[[str, str, float], None] | None = None,
    ) -> None:
        """`publish` is None without Redis; `on_leg(leg, outcome, seconds)` counts."""
        self._api = api
        self._seed = seed
        self._generation = generation
        self._term = term
        self._now = now
        self._monotonic = monotonic
        self._publish = publish
        self._on_leg = on_leg or (lambda _leg, _outcome, _seconds: None)
        self._ledgers: dict[str, _Ledger] = {}
        self._newest: dict[str, SignalRecord] = {}
        """Outlives a ledger that has to be read again."""
        self._touched: dict[str, tuple[int, int]] = {}
        self._sending: set[asyncio.Task[None]] = set()
        """By Redis; kept here, because the loop itself holds tasks only weakly."""

    async def last(self, run: Run) -> SignalRecord | None:
        """The last signal sent to this run, by whichever operator."""
        return (await self._ledger(run)).record

    def forget(self, uid: str) -> None:
        self._ledgers.pop(uid, None)
        self._newest.pop(uid, None)
        self._touched.pop(uid, None)

    async def finish(self, run: Run, pods: Sequence[Pod]) -> None:
        """Touches the pods for a signal whose sender did not come that far: it crashed, or lost the answer."""
        known = self._ledgers.get(run.uid)
        record = known.record if known else None
        if record is None or self._touched.get(run.uid) == (record.term, record.seq):
            return
        if run.status.phase is (Phase.HALTED if record.clear else Phase.HALTING):
            await self._touch_all(run, record, pods)

    async def send(self, run: Run, order: SignalOrder, pods: Sequence[Pod]) -> SignalRecord:
        """Sends by both legs; returns when the ConfigMap has it and Redis has had its chance.

        KubeError when the durable leg failed: send again, it will be the same signal.
        """
        for _ in range(CONFLICT_RETRIES):
            ledger = await self._ledger(run)
            record = self._next(run, order, ledger)
            envelope = self._sealed(run, order, record)
            bus = self._start(self._by_bus(run, envelope))
            try:
                await self._by_config_map(run, record, envelope, ledger)
            except (Conflict, AlreadyExists):
                continue
            finally:
                await asyncio.wait((bus,), timeout=BUS_PATIENCE_S)
            await self._touch_all(run, record, pods)
            return record
        raise Conflict(f"{emergency_config_map_name(run.key.name)} changes all the time")

    def _start(self, sending: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(sending)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        return task

    async def _ledger(self, run: Run) -> _Ledger:
        known = self._ledgers.get(run.uid)
        if known is not None:
            return known
        name = emergency_config_map_name(run.key.name)
        try:
            found = await self._api.get(CONFIG_MAPS, name, namespace=run.key.namespace)
        except NotFound:
            return _Ledger(self._remembered(run), "")  # not kept: it is soon made, or made by the next signal
        key = SigningKey.derive(self._seed, run.uid, Role.OPERATOR, self._generation)
        record = signal_record(found, Verifier.from_text(key.public_text())) or self._remembered(run)
        return self._keep(run, record, found)

    def _keep(self, run: Run, record: SignalRecord | None, stored: Object) -> _Ledger:
        ledger = self._ledgers[run.uid] = _Ledger(record, stored["metadata"]["resourceVersion"])
        if record is not None:
            self._newest[run.uid] = record
        return ledger

    def _remembered(self, run: Run) -> SignalRecord | None:
        """What was sent last although the ConfigMap does not say so. A number from before this leadership does not
        matter, since its term was lower."""
        halt = in_force(run.status)
        if run.uid in self._newest or halt is None or not _SIGNAL_ID.fullmatch(halt.id):
            return self._newest.get(run.uid)
        return SignalRecord(
            term=0,
            seq=0,
            signal_id=halt.id,
            mode=halt.mode,
            source=halt.source,
            attempt=run.status.attempt,
            clear=False,
        )

    def _next(self, run: Run, order: SignalOrder, ledger: _Ledger) -> SignalRecord:
        last = ledger.record
        term, seq = max(self._term(), last.term if last else 0), (last.seq if last else 0) + 1
        basis = f"{run.uid}/{seq}/{order.mode}/{order.source}/{order.attempt}"
        return SignalRecord(
            term=term,
            seq=seq,
            signal_id=order.signal_id or hashlib.sha256(basis.encode()).hexdigest()[:32],
            mode=order.mode,
            source=order.source,
            attempt=order.attempt,
            clear=order.clear,
        )

    def _sealed(self, run: Run, order: SignalOrder, record: SignalRecord) -> BusEnvelope:
        signal = EmergencySignal(
            version=1,
            level=EmergencyLevel.EMERGENCY_LEVEL_HALT,
            reason=order.reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore"),
            origin=MANAGED_BY,
            run_uid=run.uid,
            signal_id=record.signal_id,
            mode=MODES[record.mode],
            attempt=record.attempt,
            term=record.term,
            seq=record.seq,
            clear=record.clear,
            source=SOURCES[record.source],
        )
        signal.triggered_at.FromDatetime(self._now())
        return seal(
            signal.SerializeToString(),
            BusMessageType.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL,
            run_uid=run.uid,
            key=SigningKey.derive(self._seed, run.uid, Role.OPERATOR, self._generation),
            priority=MessagePriority.MESSAGE_PRIORITY_CRITICAL,
            correlation_id=record.signal_id,
        )

    async def _by_bus(self, run: Run, envelope: BusEnvelope) -> None:
        if self._publish is None:
            return
        started = self._monotonic()
        outcome = await self._publish(run.uid, envelope)
        self._on_leg("bus", outcome.status.value, self._monotonic() - started)
        if outcome.status is not Status.PUBLISHED:
            logger.warning("%s: the signal did not go by Redis: %s", run.key, outcome.detail)

    async def _by_config_map(self, run: Run, record: SignalRecord, envelope: BusEnvelope, ledger: _Ledger) -> None:
        started = self._monotonic()
        try:
            stored = await self._store(run, record, envelope, ledger)
        except KubeError as error:
            self._ledgers.pop(run.uid, None)  # an answer may have been lost: read again before the next try
            self._on_leg("configmap", type(error).__name__, self._monotonic() - started)
            raise
        self._keep(run, record, stored)
        self._on_leg("configmap", "written", self._monotonic() - started)

    async def _store(self, run: Run, record: SignalRecord, envelope: BusEnvelope, ledger: _Ledger) -> Object:
        encoded = base64.b64encode(envelope.SerializeToString()).decode()
        annotations = {SIGNAL: f"{record.term}.{record.seq}"}
        data = {EMERGENCY_SIGNAL: encoded}
        if ledger.version:
            body = {"metadata": {"annotations": annotations, "resourceVersion": ledger.version}, "data": data}
            name = emergency_config_map_name(run.key.name)
            try:
                return await self._api.patch(CONFIG_MAPS, name, namespace=run.key.namespace, body=body)
            except NotFound:
                logger.warning("%s: ConfigMap %s was deleted; it is made again", run.key, name)
        manifest = empty_ledger(run).manifest
        metadata = {**manifest["metadata"], "annotations": annotations}
        return await self._api.create(CONFIG_MAPS, {**manifest, "metadata": metadata, "data": data})

    async def _touch_all(self, run: Run, record: SignalRecord, pods: Sequence[Pod]) -> None:
        touched = await asyncio.gather(*(self._touch(pod, f"{record.term}.{record.seq}") for pod in pods))
        if all(touched):  # else `finish` tries again at the next look
            self._touched[run.uid] = (record.term, record.seq)

    async def _touch(self, pod: Pod, value: str) -> bool:
        """Makes the kubelet refresh the pod's mounts now instead of in a minute. False: try again."""
        started = self._monotonic()
        body = {"metadata": {"uid": pod.uid, "annotations": {SIGNAL: value}}}
        try:
            await self._api.patch(PODS, pod.name, namespace=pod.namespace, body=body)
        except NotFound:
            return True
        except KubeError as error:
            logger.warning("%s/%s was not touched: %s", pod.namespace, pod.name, error)
            self._on_leg("touch", type(error).__name__, self._monotonic() - started)
            return False
        self._on_leg("touch", "written", self._monotonic() - started)
        return True
