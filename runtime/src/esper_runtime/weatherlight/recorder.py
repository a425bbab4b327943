"""Numbered, signed, kept: the one way from the reporter's results into the log."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from esper_leyline import signing
from esper_leyline.events import RunEvent
from esper_leyline.incidents import FIELD
from esper_leyline.pages import Heartbeat
from esper_leyline.reasons import RunReason, SignalRejection
from esper_leyline.signing import SigningKey
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType, MessagePriority
from esper_leyline.v1.report_pb2 import RunReport, RuntimeEvent
from google.protobuf.message import DecodeError

from esper_runtime.weatherlight.clock import Clock
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.reportlog import Record, ReportLog
from esper_runtime.weatherlight.reports import Identity, Memory, Reporter

_URGENT: Final = frozenset({"transition", "recovery", "failure", "ack", "completion"})

log = logging.getLogger(__name__)


class Bell:
    """Wakes everybody who waits, each time it rings."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()


class Recorder:
    """Owns reporter and log. Its methods are synchronous, so a report is kept before anything else happens."""

    def __init__(
        self, identity: Identity, reports: ReportLog, key: Callable[[], SigningKey], clock: Clock, metrics: Metrics
    ) -> None:
        """`key` is asked for each report: it may have been rotated."""
        self.reports = reports
        self.changed = Bell()
        """Rings when a report was added."""
        self._key = key
        self._clock = clock
        self._metrics = metrics
        memory = Memory(
            dead_incarnation=reports.state.dead_incarnation, rejected_signals=reports.state.rejected_signals
        )
        self.reporter = Reporter(identity, last=_newest(reports), memory=memory)
        self._run_uid = identity.run_uid
        self._show_totals()

    @property
    def journal_offset(self) -> int:
        """Where reading the journal continues."""
        return self.reports.state.journal_offset

    def event(self, event: RuntimeEvent, journal_offset: int) -> None:
        """One event of the journal, and the offset behind it."""
        at = self._clock()
        if event.name == RunEvent.ROLLBACK_DEADLINE:
            self._metrics.deadline_missed(max(0, at.monotonic_ns - event.monotonic_ns) / 1e9)
        if event.incident:
            log.info("%s of %s", event.name or event.WhichOneof("event"), event.writer, extra={FIELD: event.incident})
        self._keep(self.reporter.event(event, at), journal_offset)

    def beat(self, beat: Heartbeat | None) -> None:
        self._keep(self.reporter.beat(beat, self._clock()))

    def died(self) -> None:
        self._keep(self.reporter.died(self._clock()))

    def returned(self, incarnation: int) -> None:
        self._keep(self.reporter.returned(incarnation, self._clock()))

    def rejected(self, reason: SignalRejection, leg: str) -> None:
        self._keep(self.reporter.rejected(reason, leg, self._clock()))

    def notice(self, reason: RunReason, message: str, *, warning: bool = False) -> None:
        """Something that weatherlight itself has to say."""
        self._keep(self.reporter.notice(reason, message, warning, self._clock()))

    def degraded(self, component: str, reason: RunReason, message: str) -> None:
        reports = self.reporter.degraded(component, reason, message, self._clock())
        if component not in self._metrics.degraded_now:
            log.warning("%s: %s", component, message)
        self._metrics.set_degraded(component, degraded=True)
        self._keep(reports)

    def restored(self, component: str) -> None:
        if component in self._metrics.degraded_now:
            log.info("%s works again", component)
        self._metrics.set_degraded(component, degraded=False)
        self._keep(self.reporter.restored(component, self._clock()))

    def _keep(self, reports: Sequence[RunReport], journal_offset: int | None = None) -> None:
        if not reports:
            return
        memory = self.reporter.memory
        state = self.reports.state._replace(
            journal_offset=self.journal_offset if journal_offset is None else journal_offset,
            dead_incarnation=memory.dead_incarnation,
            rejected_signals=memory.rejected_signals,
        )
        evicted = self.reports.append([self._seal(report) for report in reports], state)
        self._metrics.reports_kept(reports, evicted)
        self._show_totals()
        self.changed.ring()

    def _show_totals(self) -> None:
        totals = self.reporter.totals
        if totals is not None:
            self._metrics.totals(totals)

    def _seal(self, report: RunReport) -> Record:
        event = report.WhichOneof("event")
        envelope = signing.seal(
            report.SerializeToString(),
            BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT,
            run_uid=self._run_uid,
            key=self._key(),
            priority=(
                MessagePriority.MESSAGE_PRIORITY_HIGH if event in _URGENT else MessagePriority.MESSAGE_PRIORITY_NORMAL
            ),
        )
        return Record(report.seq, event is not None, envelope.SerializeToString())


def _newest(reports: ReportLog) -> RunReport | None:
    """The report that an earlier process left last. Ours by the file's checksum, so not verified again."""
    if reports.last is None:
        return None
    envelope, report = BusEnvelope(), RunReport()
    try:
        envelope.ParseFromString(reports.last.envelope)
        report.ParseFromString(envelope.payload)
    except DecodeError:
        log.exception("the newest report in the log cannot be read; numbering continues behind it")
        report.seq = reports.last.seq
    return report
