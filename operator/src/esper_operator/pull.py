"""Reports straight from the pods, where Redis is silent or one is missing: long polls, until Redis delivers again.

Each such pod is polled all the time as long as there are at most MAX_POLLS of them; of more, each gets its turn.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable

import aiohttp
from esper_leyline.labels import WEATHERLIGHT
from esper_leyline.ports import REPORTS_PATH, WEATHERLIGHT_HTTP
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.report_pb2 import ReportBatch
from google.protobuf.message import DecodeError

from esper_operator.model import Pod
from esper_operator.reports import Intake

logger = logging.getLogger(__name__)

SILENCE_S = 3.0
WAIT_S = 20
"""How long weatherlight may keep a poll open; it allows 30."""
LOOK_EVERY_S = 0.5
MAX_POLLS = 256
MAX_BATCH_BYTES = 16 * 1024 * 1024
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 10.0

Fetch = Callable[[str, int, int], Awaitable[bytes]]
"""(ip, after, wait seconds) -> a serialized ReportBatch; aiohttp.ClientError, TimeoutError or OSError."""


class Puller:
    def __init__(
        self,
        *,
        intake: Intake,
        pods: Callable[[], Iterable[Pod]],
        bus_connected: Callable[[], bool],
        fetch: Fetch,
        on_polls: Callable[[int], None] | None = None,
        max_polls: int = MAX_POLLS,
    ) -> None:
        self._intake = intake
        self._pods = pods
        self._bus_connected = bus_connected
        self._fetch = fetch
        self._on_polls = on_polls or (lambda _: None)
        self._max_polls = max_polls
        self._polls: dict[str, asyncio.Task[None]] = {}
        self._wanted: dict[str, Pod] = {}
        self._ended: dict[str, int] = {}
        """When the last poll of a pod ended, as a running number: who has waited longest comes first."""
        self._count = 0

    async def run(self) -> None:
        try:
            while True:
                self._look()
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            for poll in self._polls.values():
                poll.cancel()

    def _look(self) -> None:
        self._intake.give_up_gaps()
        self._wanted = {pod.uid: pod for pod in self._pods() if self._needs(pod)}
        self._ended = {uid: number for uid, number in self._ended.items() if uid in self._wanted}
        for uid, poll in list(self._polls.items()):
            if poll.done():
                del self._polls[uid]
                self._count += 1
                self._ended[uid] = self._count
                if not poll.cancelled():
                    poll.result()  # whatever else went wrong in it is a bug
            elif uid not in self._wanted:
                poll.cancel()
        waiting = sorted(self._wanted.keys() - self._polls.keys(), key=lambda uid: (self._ended.get(uid, 0), uid))
        for uid in waiting[: max(0, self._max_polls - len(self._polls))]:
            pod = self._wanted[uid]
            self._polls[uid] = asyncio.create_task(self._poll(pod), name=f"pull {pod.name}")
        self._on_polls(len(self._polls))

    @property
    def _crowded(self) -> bool:
        return len(self._wanted) > self._max_polls

    def _needs(self, pod: Pod) -> bool:
        """Its weatherlight can be asked, and Redis has not told us lately."""
        if not pod.ip or pod.phase not in ("Pending", "Running"):
            return False
        sidecar = pod.container(WEATHERLIGHT)
        if sidecar is None or not sidecar.started:
            return False
        silent = not self._bus_connected() or self._intake.bus_age_s(pod.run_uid, pod.rank) > SILENCE_S
        return silent or self._intake.misses(pod.run_uid)

    async def _poll(self, pod: Pod) -> None:
        """Until Redis delivers again; one question only where others wait for their turn."""
        loop, backoff = asyncio.get_running_loop(), FIRST_BACKOFF_S
        while pod.uid in self._wanted:
            after = self._intake.last_seq(pod.run_uid, pod.attempt, pod.rank)
            wait_s, asked_at = 0 if self._crowded else WAIT_S, loop.time()
            try:
                useful = self._take(pod, await self._fetch(pod.ip, after, wait_s))
            except (aiohttp.ClientError, TimeoutError, OSError, DecodeError) as error:
                logger.debug("reports of %s/%s: %s", pod.namespace, pod.name, error)
                useful = False
            if self._crowded:
                return
            if useful or loop.time() - asked_at >= wait_s:
                backoff = FIRST_BACKOFF_S
            else:  # refused, or answered too soon with nothing: such a pod must not keep us busy
                await asyncio.sleep(backoff * (0.5 + random.random()))
                backoff = min(backoff * 2, MAX_BACKOFF_S)

    def _take(self, pod: Pod, raw: bytes) -> bool:
        """Whether there was anything new in it."""
        outcomes = set()
        for item in ReportBatch.FromString(raw).envelopes:
            envelope = BusEnvelope.FromString(item)
            if envelope.run_uid == pod.run_uid:
                outcomes.add(self._intake.accept(envelope, way="pull"))
        return "accepted" in outcomes


class HttpFetch:
    """`Fetch` over HTTP to weatherlight's report log."""

    def __init__(self, session: aiohttp.ClientSession, port: int = WEATHERLIGHT_HTTP) -> None:
        """The session's connector must allow MAX_POLLS connections; `connections()` makes one that does."""
        self._session = session
        self._port = port

    async def __call__(self, ip: str, after: int, wait_s: int) -> bytes:
        host = f"[{ip}]" if ":" in ip else ip
        timeout = aiohttp.ClientTimeout(total=wait_s + 10, connect=2.0)
        url = f"http://{host}:{self._port}{REPORTS_PATH}"
        params = {"after": str(after), "wait": str(wait_s)}
        async with self._session.get(url, params=params, timeout=timeout, allow_redirects=False) as response:
            response.raise_for_status()
            return await _bounded(response)


def connections() -> aiohttp.TCPConnector:
    """For the session of HttpFetch: aiohttp's own limit is lower than the polls that may be open."""
    return aiohttp.TCPConnector(limit=MAX_POLLS)


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    """The body; a pod is no trusted peer, so it may not be larger than a full report log."""
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > MAX_BATCH_BYTES:
            raise aiohttp.ClientPayloadError(f"more than {MAX_BATCH_BYTES} bytes of reports")
        parts.append(chunk)
    return b"".join(parts)
