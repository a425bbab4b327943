"""From an arriving signal to the emergency page, and the two ways on which signals arrive."""

import asyncio
import base64
import binascii
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final

from esper_leyline import paths, signing
from esper_leyline.incidents import FIELD
from esper_leyline.oona import Oona
from esper_leyline.pages import EmergencyPage, EmergencyRecord, PageError
from esper_leyline.reasons import RunReason, SignalRejection

from esper_runtime.inotify import Change, hints
from esper_runtime.sidecar.http import write_atomically
from esper_runtime.sidecar.keyfile import Keyring
from esper_runtime.weatherlight.clock import Clock
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.recorder import Recorder
from esper_runtime.weatherlight.signals import (
    MAX_SIGNAL_BYTES,
    Accepted,
    Duplicate,
    GateState,
    Rejected,
    SignalGate,
    Verdict,
)

REDIS: Final = "redis"
CONFIG_MAP: Final = "configmap"
STATE_FILE: Final = "signals.json"

FILE_EVERY_S: Final = 5.0
"""The mounted file is looked at this often even when nothing seems to have changed."""
_FILE_POLL_S: Final = 0.2
"""And this often while its directory cannot be watched."""
_REMEMBERED: Final = 32
"""Arrival times of so many signals are kept, to see which way was faster."""
_MAX_FILE_BYTES: Final = MAX_SIGNAL_BYTES * 2
"""Base64 needs a third more."""
FORGERY_PAUSE_S: Final = 0.005
"""After each signal from Redis that does not count: a flood of them must take no processor from the trainer. The
signal behind it comes by the other way meanwhile."""

log = logging.getLogger(__name__)


class EmergencyDesk:
    """Judges what arrives and owns the emergency page: this process is its one writer."""

    def __init__(
        self,
        *,
        run_uid: str,
        attempt: int,
        page: EmergencyPage,
        keys_dir: Path,
        state_dir: Path,
        recorder: Recorder,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._page = page
        self._state_path = state_dir / STATE_FILE
        self._recorder = recorder
        self._clock = clock
        self._metrics = metrics
        self._arrivals: dict[int, int] = {}
        self._rejected: Counter[SignalRejection] = Counter()
        self.poke: Callable[[], None] = lambda: None
        """Tells the supervisor that the page has changed."""
        self.accepted: Callable[[EmergencyRecord, str], None] = lambda record, leg: None
        """Told each signal that took effect, once it has, and the way by which it came first."""
        state = self._restore()
        metrics.ordered(state.last)
        self._gate = SignalGate(
            run_uid=run_uid, attempt=attempt, verifier=Keyring(keys_dir / signing.OPERATOR_PUBLIC), state=state
        )

    @property
    def current(self) -> EmergencyRecord | None:
        """The signal on the page."""
        return self._gate.state.last

    def receive(self, raw: bytes, leg: str) -> Verdict:
        """Judges one envelope; an accepted one is on the page, and the supervisor poked, when this returns."""
        arrived = self._clock()
        verdict = self._gate.judge(raw, leg, arrived.monotonic_ns)
        self._metrics.signals.labels(leg, type(verdict).__name__.lower()).inc()
        match verdict:
            case Accepted(record):
                self._page.publish(record)
                os.utime(self._page.page.path)  # a store into shared memory wakes nobody; this wakes the sidecars
                self.poke()
                self._metrics.applied(record, leg, (self._clock().monotonic_ns - arrived.monotonic_ns) / 1e9)
                self._arrived(record.order, leg, arrived.monotonic_ns)
                self._save()
                log.info("emergency signal accepted", extra={"leg": leg, FIELD: record.signal_id})
                self.accepted(record, leg)
            case Duplicate(order):
                self._arrived(order, leg, arrived.monotonic_ns)
            case Rejected(reason):
                self._reject(reason, leg)
        return verdict

    def _reject(self, reason: SignalRejection, leg: str) -> None:
        self._metrics.rejections.labels(reason).inc()
        # The newest signal of an older attempt is still in the stream when the next attempt starts: nothing wrong.
        if reason is not SignalRejection.WRONG_ATTEMPT:
            self._rejected[reason] += 1
            if self._rejected[reason].bit_count() == 1:  # the 1st, 2nd, 4th, ...: a flood must not fill the log
                told = {"leg": leg, "reason": str(reason), "so_far": self._rejected[reason]}
                log.warning("emergency signal ignored", extra=told)
            self._recorder.rejected(reason, leg)

    def _arrived(self, order: int, leg: str, arrived_ns: int) -> None:
        self._metrics.arrival.labels(leg).set(self._clock().time.timestamp())
        first_ns = self._arrivals.setdefault(order, arrived_ns)
        if first_ns != arrived_ns:
            self._metrics.lag.labels(leg).observe((arrived_ns - first_ns) / 1e9)
        while len(self._arrivals) > _REMEMBERED:
            del self._arrivals[next(iter(self._arrivals))]

    def _save(self) -> None:
        state = self._gate.state
        document = {"words": state.last.words() if state.last is not None else None, "legs": dict(state.by_leg)}
        try:
            write_atomically(self._state_path, json.dumps(document).encode())
        except OSError as error:  # the page holds the signal; only the protection against replays is weaker
            log.error("%s cannot be written: %s", self._state_path, error.strerror)

    def _restore(self) -> GateState:
        """The newer of page and file: a kill may have come between the two, or in the middle of the page."""
        from_file = _read_state(self._state_path)
        on_page = self._page.recover()
        last = max((r for r in (from_file.last, on_page) if r is not None), key=lambda r: r.order, default=None)
        if last is not None and last != on_page:
            self._page.publish(last)
        return GateState(last=last, by_leg=from_file.by_leg)


def _read_state(path: Path) -> GateState:
    try:
        document = json.loads(path.read_bytes())
        words = document["words"]
        return GateState(
            last=EmergencyRecord.of(tuple(words)) if words else None,
            by_leg={leg: int(order) for leg, order in document["legs"].items()},
        )
    except FileNotFoundError:
        return GateState()
    except (ValueError, KeyError, TypeError, AttributeError, PageError):
        log.exception("%s cannot be read; the emergency page alone counts", path)
        return GateState()


async def follow_redis(oona: Oona, run_uid: str, desk: EmergencyDesk) -> None:
    """Leg 2: the run's stream in Redis. Endless."""
    async with aclosing(oona.signals(run_uid)) as entries:
        async for entry in entries:
            verdict = desk.receive(entry.raw, REDIS)
            await asyncio.sleep(FORGERY_PAUSE_S if isinstance(verdict, Rejected) else 0)


async def follow_directory(
    directory: Path, desk: EmergencyDesk, recorder: Recorder, beat: Callable[[], None] = lambda: None
) -> None:
    """Leg 3: the mounted ConfigMap <run>-emergency, whose content the kubelet replaces in one rename. Endless."""
    mask = Change.MOVED_TO | Change.CREATE | Change.CLOSE_WRITE | Change.DELETE
    path = directory / paths.EMERGENCY_SIGNAL
    seen = b""
    async with aclosing(hints(directory, mask, every_s=FILE_EVERY_S, poll_s=_FILE_POLL_S)) as changes:
        async for trouble in changes:
            beat()
            try:
                found = _read(path)
            except OSError as error:
                trouble = error
                found = b""
            if trouble is None:
                recorder.restored("emergency")
            else:
                message = f"{directory} cannot be watched or read: {trouble.strerror}"
                recorder.degraded("emergency", RunReason.EMERGENCY_LEG_DOWN, message)
            if found and found != seen:
                seen = found
                desk.receive(_decoded(found), CONFIG_MAP)
                await asyncio.sleep(0)


def _read(path: Path) -> bytes:
    """The file's content, empty when there is no signal yet."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES + 1).strip()
    except FileNotFoundError:
        return b""


def _decoded(text: bytes) -> bytes:
    """Empty, which no gate accepts, when the text is no base64."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""
