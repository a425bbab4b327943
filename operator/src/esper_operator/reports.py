"""Run reports on their way in: verified, in order, without repeats, and bounded, until a status includes them.

Reports come from Redis and, where that is silent, from the pods themselves (`pull.py`); both end in `Intake.accept`.
A report counts only by its signature under the run's report key. What `status.observedReport` already includes is
dropped before that costs anything. Mere progress gives way to any newer report of its rank; events are kept.
"""

import asyncio
import bisect
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from esper_leyline.oona import Entry
from esper_leyline.signing import Role, SignatureError, SigningKey, Verifier
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType
from esper_leyline.v1.report_pb2 import RunReport
from google.protobuf.message import DecodeError

from esper_operator.model import RunKey

logger = logging.getLogger(__name__)

MAX_PENDING = 1_024
"""Per run. Beyond that the oldest go; the status then says that reports were lost."""
MAX_STRANGERS, MAX_PER_STRANGER = 256, 64
"""Reports of runs that this process has not seen yet: kept for when it does."""
YIELD_EVERY = 32
"""Reports verified before other tasks get their turn; about 5 ms."""
URGENT = frozenset({"transition", "recovery", "ack", "failure", "completion", "notice"})

BEGIN = (0, 0)
Place = tuple[int, int]
"""(attempt, seq): order of a run's reports."""


@dataclass(slots=True)
class _Inbox:
    key: RunKey
    verifier: Verifier
    observed: Place = (0, 0)
    pending: list[RunReport] = field(default_factory=list)
    newest: dict[int, Place] = field(default_factory=dict)
    """By rank; the latest heard of."""
    heard_at: dict[tuple[int, int], float] = field(default_factory=dict)
    """By (attempt, rank)."""
    bus_at: dict[int, float] = field(default_factory=dict)
    """By rank: when Redis last delivered."""
    cursor: Place | None = None
    forged: int = 0


class Intake:
    def __init__(
        self,
        *,
        seed: bytes,
        generation: int,
        monotonic: Callable[[], float],
        on_report: Callable[[RunKey, bool], None],
        on_outcome: Callable[[str, str], None] | None = None,
        on_forged: Callable[[RunKey, str], None] | None = None,
    ) -> None:
        """`on_report(run, urgent)` wakes the reconciler; `on_outcome(way, outcome)` counts; `on_forged(run, reason)`
        tells people."""
        self._seed = seed
        self._generations = tuple(g for g in (generation, generation - 1) if g >= 1)
        self._monotonic = monotonic
        self._on_report = on_report
        self._count = on_outcome or (lambda _way, _outcome: None)
        self._on_forged = on_forged or (lambda _key, _reason: None)
        self._inboxes: dict[str, _Inbox] = {}
        self._strangers: OrderedDict[str, deque[tuple[BusEnvelope, str]]] = OrderedDict()
        self._position = BEGIN
        self._moved = asyncio.Event()

    # --- what the rest of the operator asks and says ---

    def observe(self, uid: str, key: RunKey, observed: Place) -> None:
        """The run exists and its status includes all reports up to `observed`."""
        inbox = self._inboxes.get(uid)
        if inbox is None:
            inbox = self._inboxes[uid] = _Inbox(key, self._verifier(uid))
            for envelope, way in self._strangers.pop(uid, ()):
                self.accept(envelope, way=way)
        if observed > inbox.observed:
            inbox.observed = observed
            inbox.pending = [report for report in inbox.pending if _place(report) > observed]

    def fold(self, uid: str, place: Place) -> None:
        """Reports up to `place` changed nothing: forget them without a write."""
        inbox = self._inboxes.get(uid)
        if inbox is not None:
            inbox.cursor = max(place, inbox.cursor or (0, 0))
            inbox.pending = [report for report in inbox.pending if _place(report) > place]

    def forget(self, uid: str) -> None:
        self._inboxes.pop(uid, None)
        self._strangers.pop(uid, None)

    def of(self, uid: str) -> tuple[RunReport, ...]:
        """Reports that no status includes yet, in order."""
        inbox = self._inboxes.get(uid)
        return tuple(inbox.pending) if inbox else ()

    def cursor(self, uid: str) -> Place | None:
        inbox = self._inboxes.get(uid)
        return inbox.cursor if inbox else None

    def age_s(self, uid: str, attempt: int) -> float | None:
        """Since any rank of that attempt was last heard of; None: never."""
        inbox = self._inboxes.get(uid)
        times = [at for (a, _), at in inbox.heard_at.items() if a == attempt] if inbox else []
        return self._monotonic() - max(times) if times else None

    def bus_age_s(self, uid: str, rank: int) -> float:
        """Since Redis delivered the last report of that rank; infinite when it never did."""
        inbox = self._inboxes.get(uid)
        return self._monotonic() - inbox.bus_at[rank] if inbox and rank in inbox.bus_at else float("inf")

    def last_seq(self, uid: str, attempt: int, rank: int) -> int:
        """The newest seq of that attempt and rank; 0 when none is known."""
        inbox = self._inboxes.get(uid)
        if inbox is None:
            return 0
        places = (inbox.newest.get(rank, (0, 0)), inbox.observed if rank == 0 else (0, 0))
        return max((seq for at, seq in places if at == attempt), default=0)

    # --- the way in ---

    async def read(self, entries: AsyncIterator[Entry]) -> None:
        """Takes in what Redis has and gets; endless."""
        taken = 0
        async for entry in entries:
            envelope = entry.envelope()
            if envelope is None:
                self._count("bus", "malformed")
            else:
                self.accept(envelope, way="bus")
            self._position = entry.order
            self._moved.set()
            taken += 1
            if taken % YIELD_EVERY == 0:
                await asyncio.sleep(0)

    async def wait_read(self, entry: Entry) -> None:
        """Returns when `read` has come to that entry."""
        while self._position < entry.order:
            self._moved.clear()
            await self._moved.wait()

    def accept(self, envelope: BusEnvelope, *, way: str) -> str:
        """Takes one report in; says what became of it: accepted, repeated, unknown, malformed or forged."""
        outcome = self._accept(envelope, way)
        self._count(way, outcome)
        return outcome

    def _accept(self, envelope: BusEnvelope, way: str) -> str:
        if envelope.message_type != BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT:
            return "malformed"
        inbox = self._inboxes.get(envelope.run_uid)
        if inbox is None:
            self._keep_stranger(envelope, way)
            return "unknown"
        report = RunReport()
        try:
            report.ParseFromString(envelope.payload)
        except DecodeError:
            return "malformed"
        if report.run_uid != envelope.run_uid or report.attempt < 1 or report.seq < 1:
            return "malformed"
        done = max(inbox.observed, inbox.cursor or (0, 0))
        if _place(report) < done:
            return "repeated"  # nothing depends on it, so its signature does not matter
        try:
            inbox.verifier.check_envelope(envelope)
        except SignatureError as error:
            self._forged(inbox, error.reason)
            return "forged"
        self._hear(inbox, report, way)
        if _place(report) == done or _known(inbox.pending, report):
            return "repeated"
        self._insert(inbox, report)
        self._on_report(inbox.key, report.WhichOneof("event") in URGENT)
        return "accepted"

    def _forged(self, inbox: _Inbox, reason: str) -> None:
        inbox.forged += 1
        if inbox.forged.bit_count() == 1:  # the 1st, 2nd, 4th, ...: a flood must not fill the log
            logger.warning("a report of %s does not count: %s; %d so far", inbox.key, reason, inbox.forged)
            self._on_forged(inbox.key, reason)

    def _hear(self, inbox: _Inbox, report: RunReport, way: str) -> None:
        now = self._monotonic()
        if _place(report) < inbox.newest.get(report.rank, (0, 0)):
            return
        inbox.newest[report.rank] = _place(report)
        for known in [k for k in inbox.heard_at if k[1] == report.rank]:
            del inbox.heard_at[known]
        inbox.heard_at[report.attempt, report.rank] = now
        if way == "bus":
            inbox.bus_at[report.rank] = now

    def _insert(self, inbox: _Inbox, report: RunReport) -> None:
        bisect.insort(inbox.pending, report, key=_place)
        inbox.pending = _thinned(inbox.pending)[-MAX_PENDING:]

    def _keep_stranger(self, envelope: BusEnvelope, way: str) -> None:
        kept = self._strangers.setdefault(envelope.run_uid, deque(maxlen=MAX_PER_STRANGER))
        kept.append((envelope, way))
        self._strangers.move_to_end(envelope.run_uid)
        if len(self._strangers) > MAX_STRANGERS:
            self._strangers.popitem(last=False)

    def _verifier(self, uid: str) -> Verifier:
        keys = (SigningKey.derive(self._seed, uid, Role.REPORT, g) for g in self._generations)
        return Verifier.from_text("".join(key.public_text() for key in keys))


def _place(report: RunReport) -> Place:
    return report.attempt, report.seq


def _known(pending: list[RunReport], report: RunReport) -> bool:
    at = bisect.bisect_left(pending, _place(report), key=_place)
    return any(_place(r) == _place(report) and r.rank == report.rank for r in pending[at : at + 64])


def _thinned(pending: list[RunReport]) -> list[RunReport]:
    """Without mere progress that a newer report of the same rank supersedes."""
    kept: list[RunReport] = []
    followed: set[int] = set()
    for report in reversed(pending):
        if report.WhichOneof("event") is not None or report.rank not in followed:
            kept.append(report)
        followed.add(report.rank)
    kept.reverse()
    return kept
