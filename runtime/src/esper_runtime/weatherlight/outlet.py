"""The two ways out for reports: pushed to Oona as soon as they exist, pulled from the log by HTTP."""

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Final

from aiohttp import web
from esper_leyline.oona import Backoff, Oona, Status
from esper_leyline.pages import Page, PageError
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.report_pb2 import ReportBatch

from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.recorder import Recorder
from esper_runtime.weatherlight.unsure import LOOK_S, Unsure

CURSOR_FILE: Final = "published.page"
MAX_WAIT_S: Final = 30.0
MAX_BATCH_BYTES: Final = 1024 * 1024
MAX_PULLS: Final = 32
"""Long polls at one time."""
_RETRY_FIRST_S: Final = 0.05
_RETRY_MAX_S: Final = 1.0

log = logging.getLogger(__name__)


class Outlet:
    """Remembers how far each way has got. What Redis is sure to have survives a restart; beyond it reports are sent
    again, byte by byte the same, and their reader drops what it has."""

    def __init__(self, recorder: Recorder, state_dir: Path, metrics: Metrics) -> None:
        self._recorder = recorder
        self._metrics = metrics
        self._page = Page.create(state_dir / CURSOR_FILE)
        self.published_seq = self._restored()
        """Redis has everything up to here."""
        self._unsure: Unsure[int] = Unsure()
        """Numbers of the last ones in Redis."""
        self.pulled_seq = 0
        """Somebody who pulls has everything up to here."""
        self._pulls = 0
        metrics.spool_reports.set_function(lambda: self._waiting()[0])
        metrics.spool_bytes.set_function(lambda: self._waiting()[1])

    def _waiting(self) -> tuple[int, int]:
        """Number and bytes of the reports that Redis has not acknowledged."""
        return self._recorder.reports.waiting(self.published_seq)

    def _restored(self) -> int:
        try:
            return self._page.read()[0]
        except PageError:  # killed inside the write: everything kept is sent again
            return 0

    @property
    def delivered(self) -> bool:
        """True when the newest report has reached somebody by one way or the other."""
        return max(self.published_seq, self.pulled_seq) >= self._recorder.reports.last_seq

    # --- push ----------------------------------------------------------------------------------------------------

    async def publish(self, oona: Oona) -> None:
        """Sends reports in order, each until Redis has it. Endless.

        History comes before progress by itself: of plain progress only the newest report is kept, and it comes last.
        """
        backoff = Backoff(first_s=_RETRY_FIRST_S, max_s=_RETRY_MAX_S)
        while True:
            if forgotten := self._unsure.forgotten(oona):
                self.published_seq = forgotten[0] - 1
            record = self._recorder.reports.next_after(self.published_seq)
            if record is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._recorder.changed.wait()
                continue
            began = time.monotonic()
            outcome = await oona.publish_report(BusEnvelope.FromString(record.envelope))
            self._metrics.published(outcome.status, time.monotonic() - began)
            if outcome.status is Status.PUBLISHED:
                self.published_seq = record.seq
                self._unsure.acknowledged(record.seq)
                self._page.write(0, ((self._unsure.oldest or record.seq) - 1, 0, 0, 0, 0, 0, 0))
                backoff.reset()
            else:
                await asyncio.sleep(backoff.next_s())

    # --- pull ----------------------------------------------------------------------------------------------------

    async def serve(self, request: web.Request) -> web.Response:
        """GET /v1/reports?after=<seq>&wait=<seconds>: the kept reports behind `after`, waiting for one if need be.

        An empty batch after the wait says that there is nothing new.
        """
        try:
            after = _number(request.query.get("after", "0"), "after", 2**64 - 1)
            wait_s = _number(request.query.get("wait", "0"), "wait", int(MAX_WAIT_S))
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")
        if self._pulls >= MAX_PULLS:
            return web.Response(status=503, text=f"{MAX_PULLS} pulls are under way; try again later\n")
        self._metrics.pulls.inc()
        if after <= self._recorder.reports.last_seq:
            self.pulled_seq = max(self.pulled_seq, after)
        self._pulls += 1
        try:
            await self._wait_beyond(after, wait_s)
        finally:
            self._pulls -= 1
        return web.Response(body=self._batch(after), content_type="application/x-protobuf")

    async def _wait_beyond(self, seq: int, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                while self._recorder.reports.last_seq <= seq:
                    await self._recorder.changed.wait()
        except TimeoutError:
            return

    def _batch(self, after: int) -> bytes:
        reports = self._recorder.reports
        return ReportBatch(
            envelopes=[record.envelope for record in reports.after(after, max_bytes=MAX_BATCH_BYTES)],
            last_seq=reports.last_seq,
            first_seq=reports.first_seq,
        ).SerializeToString()


def _number(text: str, name: str, limit: int) -> int:
    """ValueError that names the parameter unless `text` is an integer from 0 to `limit`."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20) or int(text) > limit:
        raise ValueError(f"{name} is {text[:40]!r}; it must be an integer from 0 to {limit}")
    return int(text)
