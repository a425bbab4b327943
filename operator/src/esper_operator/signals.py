"""Emergency signals on their way out: signed, numbered, by Redis at once, and by ConfigMap for the record.

The number of a signal is the last one in ConfigMap `<run>-emergency` plus one, written with that ConfigMap's resource
version; its id is derived from the number it follows. So a signal that is sent again after a crash or a lost answer
is the same signal, not a second one. A ConfigMap that somebody deleted or emptied is made again, and numbers go on from
what this process or the run's status remembers.

A signal that Redis has had and the ConfigMap has not is the last one too: who asks is told of it, it is recorded as
soon as the API server lets us, and no status speaks of it before that.
"""

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterable, Mapping, Sequence
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
ANSWER_PATIENCE_S = 0.5
"""For pods that Redis may have reached. Then those that have not answered are touched, who may be cut off from it."""
MAX_REASON_BYTES = 256
CONFLICT_RETRIES = 3
_SIGNAL_ID = re.compile("[0-9a-f]{32}")

Publish = Callable[[Mapping[str, BusEnvelope]], Awaitable[Mapping[str, Outcome]]]
"""Envelopes by run UID, all at once; never raises for any state of Redis."""

Answered = Callable[[str, SignalRecord], Container[str]]
"""(run UID, signal) -> names of the pods whose trainer has answered to it."""

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


@dataclass(frozen=True, slots=True)
class _Pending:
    """Sent by Redis; not in the ConfigMap as far as this process knows."""

    record: SignalRecord
    envelope: BusEnvelope


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
        answered: Answered = lambda _uid, _signal: (),
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
        self._answered = answered
        self._on_leg = on_leg or (lambda _leg, _outcome, _seconds: None)
        self._ledgers: dict[str, _Ledger] = {}
        self._newest: dict[str, SignalRecord] = {}
        """Outlives a ledger that has to be read again."""
        self._pending: dict[str, _Pending] = {}
        self._recording: dict[str, asyncio.Lock] = {}
        self._published: dict[str, tuple[int, int]] = {}
        """The last signal that Redis took, by run UID."""
        self._touched: dict[str, tuple[int, int]] = {}
        """The last signal for which no pod has to be touched any more, or will be, by run UID."""
        self._tasks: set[asyncio.Task[None]] = set()
        """Kept here, because the loop itself holds tasks only weakly."""

    async def last(self, run: Run) -> SignalRecord | None:
        """The last signal sent to this run, by whichever operator."""
        known = self._pending.get(run.uid) or await self._ledger(run)
        return known.record

    def settled(self, uid: str) -> bool:
        """All that was sent to this run is known and on record: `announce` may number the next signal."""
        return uid in self._ledgers and uid not in self._pending

    def newest(self, uid: str) -> SignalRecord | None:
        """The last signal as far as this process has read; `last` reads."""
        known = self._pending.get(uid) or self._ledgers.get(uid)
        return known.record if known is not None else None

    def recording(self, uid: str) -> bool:
        """What was sent to this run is just being written down."""
        return uid in self._recording and self._recording[uid].locked()

    def forget(self, uid: str) -> None:
        everything: tuple[dict[str, Any], ...] = (
            self._ledgers, self._newest, self._pending, self._recording, self._published, self._touched,
        )  # fmt: skip
        for known in everything:
            known.pop(uid, None)

    def announce(self, orders: Iterable[tuple[Run, SignalOrder]]) -> "asyncio.Task[None]":
        """Sends signals to runs that are settled, by Redis, all at once; `record` must follow. Wait for the task, or
        not: it never fails."""
        sent = {run.uid: self._prepare(run, order, self._ledgers[run.uid].record) for run, order in orders}
        return self._start(self._by_bus(sent))

    async def record(self, run: Run, pods: Sequence[Pod], patience_s: float = ANSWER_PATIENCE_S) -> None:
        """The slow leg of what was announced: the ConfigMap, and the pods' touch. KubeError: `finish` goes on."""
        pending = self._pending.get(run.uid)
        if pending is None:
            return
        if not await self._by_config_map(run, pending):
            raise Conflict("another operator has sent a signal meanwhile")
        await self._wake(run, pending.record, pods, patience_s)

    async def finish(self, run: Run, pods: Sequence[Pod]) -> None:
        """Completes a signal whose sender did not come that far: it crashed, lost an answer, or got none."""
        if run.uid in self._pending:
            await self.record(run, pods)
            return
        record = self.newest(run.uid)
        if record is None or self._touched.get(run.uid) == _number(record):
            return
        if run.status.phase is (Phase.HALTED if record.clear else Phase.HALTING):
            await self._touch_all(run, record, pods)

    async def send(self, run: Run, order: SignalOrder, pods: Sequence[Pod]) -> SignalRecord:
        """Sends by both legs; returns when the ConfigMap has it and Redis has had its chance.

        KubeError when the durable leg failed: `finish` tries again, with the same signal.
        """
        for _ in range(CONFLICT_RETRIES):
            ledger = await self._ledger(run)
            pending, bus = self._pending.get(run.uid), None
            if pending is None and ledger.record is not None and _says(ledger.record, order):
                await self._touch_all(run, ledger.record, pods)
                return ledger.record
            if pending is None or not _says(pending.record, order):
                pending = self._prepare(run, order, ledger.record)
                bus = self._start(self._by_bus({run.uid: pending}))
            try:
                recorded = await self._by_config_map(run, pending)
            finally:
                if bus is not None:
                    await asyncio.wait((bus,), timeout=BUS_PATIENCE_S)
            if recorded:
                await self._wake(run, pending.record, pods)
                return pending.record
        raise Conflict(f"{emergency_config_map_name(run.key.name)} changes all the time")

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
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
        verifier = Verifier.derive(self._seed, run.uid, Role.OPERATOR, self._generation)
        record = signal_record(found, verifier)
        if record is not None:
            found = await self._resealed(run, found)
        return self._keep(run, record or self._remembered(run), found)

    async def _resealed(self, run: Run, found: Object) -> Object:
        """The same signal under the key in force: a pod that starts again reads it there, and may know no older key."""
        before = BusEnvelope.FromString(base64.b64decode(found["data"][EMERGENCY_SIGNAL]))
        key = self._key(run)
        if before.key_id == key.key_id:
            return found
        after = seal(
            before.payload,
            before.message_type,
            run_uid=run.uid,
            key=key,
            priority=before.priority,
            correlation_id=before.correlation_id,
        )
        encoded = base64.b64encode(after.SerializeToString()).decode()
        version = found["metadata"]["resourceVersion"]
        body = {"metadata": {"resourceVersion": version}, "data": {EMERGENCY_SIGNAL: encoded}}
        name = emergency_config_map_name(run.key.name)
        try:
            return await self._api.patch(CONFIG_MAPS, name, namespace=run.key.namespace, body=body)
        except (Conflict, NotFound):
            return found  # it has just changed: whoever sends next learns so by the same conflict

    def _key(self, run: Run) -> SigningKey:
        return SigningKey.derive(self._seed, run.uid, Role.OPERATOR, self._generation)

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

    def _prepare(self, run: Run, order: SignalOrder, recorded: SignalRecord | None) -> _Pending:
        """The signal that comes next; from now on it is the last one."""
        before = self._pending.get(run.uid)
        record = self._next(run, order, before.record if before is not None else recorded)
        pending = self._pending[run.uid] = _Pending(record, self._sealed(run, order, record))
        return pending

    def _next(self, run: Run, order: SignalOrder, last: SignalRecord | None) -> SignalRecord:
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
            time=self._now(),
        )

    def _sealed(self, run: Run, order: SignalOrder, record: SignalRecord) -> BusEnvelope:
        signal = EmergencySignal(
            version=1,
            level=EmergencyLevel.EMERGENCY_LEVEL_HALT,
            reason=order.reason.encode(errors="replace")[:MAX_REASON_BYTES].decode(errors="ignore"),
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
        signal.triggered_at.FromDatetime(record.time or self._now())
        return seal(
            signal.SerializeToString(),
            BusMessageType.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL,
            run_uid=run.uid,
            key=self._key(run),
            priority=MessagePriority.MESSAGE_PRIORITY_CRITICAL,
            correlation_id=record.signal_id,
        )

    async def _by_bus(self, sent: Mapping[str, _Pending]) -> None:
        if self._publish is None:
            return
        started = self._monotonic()
        outcomes = await self._publish({uid: pending.envelope for uid, pending in sent.items()})
        seconds = self._monotonic() - started
        failed = [outcome for outcome in outcomes.values() if outcome.status is not Status.PUBLISHED]
        for uid, outcome in outcomes.items():
            self._on_leg("bus", outcome.status.value, seconds)
            if outcome.status is Status.PUBLISHED and (uid in self._ledgers or uid in self._pending):
                self._published[uid] = _number(sent[uid].record)
        if failed:
            logger.warning("%d of %d signals did not go by Redis: %s", len(failed), len(outcomes), failed[0].detail)

    async def _by_config_map(self, run: Run, pending: _Pending) -> bool:
        """False when another operator has sent something else meanwhile: what is pending counts no more."""
        started, outcome = self._monotonic(), "written"
        try:
            async with self._recording.setdefault(run.uid, asyncio.Lock()):
                return await self._on_record(run, pending)
        except KubeError as error:
            self._ledgers.pop(run.uid, None)  # an answer may have been lost: read again before the next try
            outcome = type(error).__name__
            raise
        finally:
            self._on_leg("configmap", outcome, self._monotonic() - started)

    async def _on_record(self, run: Run, pending: _Pending) -> bool:
        mine = pending.record
        for _ in range(CONFLICT_RETRIES):
            if self._pending.get(run.uid) is not pending:
                return True  # another task of ours has written it down, or sent the next
            ledger = await self._ledger(run)
            found = ledger.record
            if found is not None and _number(found) >= _number(mine):
                self._settle(run, pending)
                return found == mine
            try:
                stored = await self._store(run, mine, pending.envelope, ledger)
            except (Conflict, AlreadyExists):
                self._ledgers.pop(run.uid, None)
                continue
            self._keep(run, mine, stored)
            self._settle(run, pending)
            return True
        raise Conflict(f"{emergency_config_map_name(run.key.name)} changes all the time")

    def _settle(self, run: Run, pending: _Pending) -> None:
        if self._pending.get(run.uid) is pending:
            del self._pending[run.uid]

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

    async def _wake(
        self, run: Run, record: SignalRecord, pods: Sequence[Pod], patience_s: float = ANSWER_PATIENCE_S
    ) -> None:
        """Touches the pods, but gives them time to answer first where Redis has taken the signal."""
        if self._published.get(run.uid) == _number(record):
            self._touched[run.uid] = _number(record)
            self._start(self._touch_silent(run, record, pods, patience_s))
        else:
            await self._touch_all(run, record, pods)

    async def _touch_silent(self, run: Run, record: SignalRecord, pods: Sequence[Pod], patience_s: float) -> None:
        await asyncio.sleep(patience_s)
        if self._touched.get(run.uid) == _number(record):  # else the run is gone, or was sent another signal
            answered = self._answered(run.uid, record)
            await self._touch_all(run, record, [pod for pod in pods if pod.name not in answered])

    async def _touch_all(self, run: Run, record: SignalRecord, pods: Sequence[Pod]) -> None:
        self._touched[run.uid] = number = _number(record)
        live = (pod for pod in pods if pod.phase not in ("Succeeded", "Failed"))
        touched = await asyncio.gather(*(self._touch(pod, f"{record.term}.{record.seq}") for pod in live))
        if not all(touched) and self._touched.get(run.uid) == number:
            del self._touched[run.uid]  # `finish` tries again at the next look

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


def _number(record: SignalRecord) -> tuple[int, int]:
    return record.term, record.seq


def _says(record: SignalRecord, order: SignalOrder) -> bool:
    asked = (order.mode, order.source, order.attempt, order.clear)
    return (record.mode, record.source, record.attempt, record.clear) == asked
