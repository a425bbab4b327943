"""Packets to the receiver in batches; each caller learns what became of its own.

A batch is what waits when the one before is answered. A batch that the receiver refuses is sent again one by one, so
that only what is to blame is given up. What it could not take now is for the caller to bring again.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import aiohttp
from esper_leyline.oona import RetryLater
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse

from esper_runtime.otlp.message import Item, request
from esper_runtime.otlp.metrics import Metrics

MAX_BATCH: Final = 128
TIMEOUT_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 64 * 1024
_LATER: Final = frozenset({408, 429, 502, 503, 504})
"""HTTP statuses at which OTLP wants the request again."""
_OK: Final = 200
_EVERY_REFUSAL: Final = 100
"""One line for so many, after the first."""

log = logging.getLogger(__name__)


class Refused(Exception):
    """The receiver will never take this packet."""


@dataclass(eq=False, slots=True)
class _Waiting:
    item: Item
    since: float
    done: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Sender:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`url` is the whole address of the receiver's logs, usually …/v1/logs."""
        self._session = session
        self._url = url
        self._metrics = metrics
        self._clock = clock
        self._queue: deque[_Waiting] = deque()
        self._came = asyncio.Event()
        self._sending: Sequence[_Waiting] = ()
        self._away = False
        self._refusals = 0
        metrics.lag.set_function(self._lag)

    def _lag(self) -> float:
        """Seconds that the oldest packet has been in hand."""
        return max((self._clock() - one.since for one in (*self._sending, *self._queue)), default=0.0)

    async def send(self, item: Item) -> None:
        """Returns once the receiver has it. RetryLater when it cannot take it now, Refused when it never will.

        The caller bounds how many wait.
        """
        waiting = _Waiting(item, self._clock())
        self._queue.append(waiting)
        self._came.set()
        try:
            await waiting.done
        finally:
            if waiting in self._queue:  # cancelled before its turn
                self._queue.remove(waiting)

    async def run(self) -> None:
        """Endless."""
        while True:
            while not self._queue:
                self._came.clear()
                await self._came.wait()
            batch = [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]
            self._sending = batch
            await self._send(batch)
            self._sending = ()

    async def _send(self, batch: Sequence[_Waiting]) -> None:
        try:
            await self._post([one.item for one in batch])
        except Refused as refusal:
            if len(batch) > 1:
                for one in batch:
                    await self._send([one])
            else:
                self._tell_refused(refusal)
                _answer(batch, refusal)
        except RetryLater as error:
            self._tell_away(error)
            _answer(batch, error)
        else:
            self._tell_taken()
            _answer(batch, None)

    def _tell_away(self, error: RetryLater) -> None:
        if not self._away:
            log.warning("%s; events wait in Redis until it takes them", error)
        self._away = True

    def _tell_taken(self) -> None:
        if self._away:
            log.info("the receiver takes events again")
        self._away = False

    def _tell_refused(self, refusal: Refused) -> None:
        if self._refusals % _EVERY_REFUSAL == 0:
            log.warning("%s; the event becomes a dead letter, %d so far", refusal, self._refusals + 1)
        self._refusals += 1

    async def _post(self, items: Sequence[Item]) -> None:
        began = self._clock()
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._session.post(
                    self._url, data=request(items), headers={"Content-Type": "application/x-protobuf"}
                ) as answer,
            ):
                status, body = answer.status, await answer.content.read(MAX_ANSWER_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._metrics.batches.labels("unavailable").inc()
            raise RetryLater(f"the receiver cannot be reached: {error or type(error).__name__}") from error
        if status in _LATER:
            self._metrics.batches.labels("unavailable").inc()
            raise RetryLater(f"the receiver answers {status}")
        if status != _OK:
            self._metrics.batches.labels("refused").inc()
            raise Refused(f"the receiver answers {status}: {body[:120].decode(errors='replace')}")
        self._metrics.accepted(self._clock() - began)
        self._look_for_rejections(body, len(items))

    def _look_for_rejections(self, body: bytes, sent: int) -> None:
        """A receiver may take a part. Which, it does not say, and OTLP forbids to send the batch again."""
        try:
            partial = ExportLogsServiceResponse.FromString(body).partial_success
        except DecodeError:
            return  # it said 200
        if partial.rejected_log_records and sent == 1:
            raise Refused(f"the receiver rejects it: {partial.error_message[:160]}")
        if partial.rejected_log_records:
            self._metrics.rejected(partial.rejected_log_records, partial.error_message)


def _answer(batch: Sequence[_Waiting], error: Exception | None) -> None:
    for one in batch:
        if one.done.done():  # its caller has given up
            continue
        if error is None:
            one.done.set_result(None)
        else:
            one.done.set_exception(error)
