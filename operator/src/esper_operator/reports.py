"""Run reports on their way in: verified, in order, without repeats, and bounded, until a status includes them.

Reports come from Redis and, where that is silent, from the pods themselves (`pull.py`); both end in `Intake.accept`.
A report counts only by its signature under the run's report key. What `status.observedReport` already includes is
dropped before that costs anything. Mere progress gives way to any newer report of its rank; events are kept. Each
report tells which event came before it, so that what Redis lost, or somebody removed there, is missed: it is pulled,
and what follows it waits that long.
"""

import asyncio
import bisect
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from esper_leyline import contracts
from esper_leyline.labels import TOLARIA
from esper_leyline.oona import Entry
from esper_leyline.signing import Role, SignatureError, Verifier
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType
from esper_leyline.v1.report_pb2 import RunReport
from google.protobuf.message import DecodeError

from esper_operator.model import RunKey, SignalRecord

logger = logging.getLogger(__name__)

MAX_RANKS = 1024
"""Workers that a run may have; each is remembered here."""
MAX_PENDING = 1_024
"""Per run. Beyond that the oldest go; the status then says that reports were lost."""
GAP_PATIENCE_S = 3.0
"""How long reports wait for one before them that Redis did not bring. Then the status says that it is lost."""
MAX_STRANGERS, MAX_PER_STRANGER, MAX_STRANGER_BYTES = 256, 64, 16 * 1024 * 1024
"""Reports of runs that this process has not seen yet: kept for when it does."""
YIELD_EVERY = 32
"""Reports verified before other tasks get their turn; about 5 ms."""
URGENT = frozenset({"transition", "recovery", "ack", "failure", "completion", "notice"})

BEGIN = (0, 0)
Place = tuple[int, int]
"""(attempt, seq): order of a run's reports."""


@dataclass(frozen=True, slots=True)
class _Gap:
    """Behind `after` an event is missing; `place` is the first report that says so."""

    after: int
    place: Place
    since: float


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
    """By rank: when Redis last delivered something new."""
    bus_newest: dict[int, Place] = field(default_factory=dict)
    gap: _Gap | None = None
    signal: tuple[str, bool] = ("", False)
    """Id of the signal last answered to, and whether it was a clear."""
    answered: set[str] = field(default_factory=set)
    """Pods whose trainer has answered to it."""
    cursor: Place | None = None
    forged: int = 0

    @property
    def done(self) -> Place:
        return max(self.observed, self.cursor or BEGIN)


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
        self._generation = generation
        self._monotonic = monotonic
        self._on_report = on_report
        self._count = on_outcome or (lambda _way, _outcome: None)
        self._on_forged = on_forged or (lambda _key, _reason: None)
        self._inboxes: dict[str, _Inbox] = {}
        self._strangers = _Strangers()
        self._gaps: set[str] = set()
        """Runs whose reports wait for one that is missing."""
        self._position = BEGIN
        self._moved = asyncio.Event()

    # --- what the rest of the operator asks and says ---

    def observe(self, uid: str, key: RunKey, observed: Place) -> None:
        """The run exists and its status includes all reports up to `observed`."""
        inbox = self._inboxes.get(uid)
        if inbox is None:
            inbox = self._inboxes[uid] = _Inbox(key, self._verifier(uid))
            for envelope, way in self._strangers.pop(uid):
                self.accept(envelope, way=way)
        if observed > inbox.observed:
            inbox.observed = observed
            inbox.pending = [report for report in inbox.pending if _place(report) > observed]
            self._look_for_gap(uid, inbox)

    def fold(self, uid: str, place: Place) -> None:
        """Reports up to `place` changed nothing: forget them without a write."""
        inbox = self._inboxes.get(uid)
        if inbox is not None:
            inbox.cursor = max(place, inbox.cursor or (0, 0))
            inbox.pending = [report for report in inbox.pending if _place(report) > place]
            self._look_for_gap(uid, inbox)

    def forget(self, uid: str) -> None:
        self._inboxes.pop(uid, None)
        self._strangers.pop(uid)
        self._gaps.discard(uid)

    def of(self, uid: str) -> tuple[RunReport, ...]:
        """Reports that no status includes yet, in order; without those that wait for a missing one."""
        inbox = self._inboxes.get(uid)
        if inbox is None:
            return ()
        gap = inbox.gap
        if gap is None or self._given_up(gap):
            return tuple(inbox.pending)
        return tuple(report for report in inbox.pending if _place(report) < gap.place)

    def misses(self, uid: str) -> bool:
        """Something is missing that its pod may still have."""
        return uid in self._gaps

    def give_up_gaps(self) -> None:
        """Wakes the runs that have waited long enough. Call it now and then."""
        for uid in [uid for uid in self._gaps if (gap := self._inboxes[uid].gap) is None or self._given_up(gap)]:
            self._gaps.discard(uid)
            self._on_report(self._inboxes[uid].key, True)

    def _given_up(self, gap: _Gap) -> bool:
        return self._monotonic() - gap.since >= GAP_PATIENCE_S

    def cursor(self, uid: str) -> Place | None:
        inbox = self._inboxes.get(uid)
        return inbox.cursor if inbox else None

    def answered(self, uid: str, signal: SignalRecord) -> frozenset[str]:
        """Pods whose trainer has answered to the signal, when it is the newest that any answered to."""
        inbox = self._inboxes.get(uid)
        known = inbox is not None and inbox.signal == (signal.signal_id, signal.clear)
        return frozenset(inbox.answered) if inbox is not None and known else frozenset()

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
        """The newest seq of that attempt and rank up to which nothing is missing; 0 when none is known."""
        inbox = self._inboxes.get(uid)
        if inbox is None:
            return 0
        if uid in self._gaps and inbox.gap is not None and rank == 0 and inbox.gap.place[0] == attempt:
            return inbox.gap.after
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
        """Takes one report in; says what became of it, one of metrics.operator.OUTCOMES."""
        outcome = self._accept(envelope, way)
        self._count(way, outcome)
        return outcome

    def _accept(self, envelope: BusEnvelope, way: str) -> str:
        if envelope.message_type != BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT:
            return "malformed"
        inbox = self._inboxes.get(envelope.run_uid)
        if inbox is None:
            return self._of_stranger(envelope, way)
        report = RunReport()
        try:
            report.ParseFromString(envelope.payload)
        except DecodeError:
            return "malformed"
        if report.version != contracts.VERSION:
            return "wrong_version"
        if report.run_uid != envelope.run_uid or report.attempt < 1 or report.seq < 1 or report.rank >= MAX_RANKS:
            return "malformed"
        done = inbox.done
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
        _note_answer(inbox, report)
        self._look_for_gap(report.run_uid, inbox)
        self._on_report(inbox.key, report.WhichOneof("event") in URGENT)
        return "accepted"

    def _forged(self, inbox: _Inbox, reason: str) -> None:
        inbox.forged += 1
        if inbox.forged.bit_count() == 1:  # the 1st, 2nd, 4th, ...: a flood must not fill the log
            logger.warning("a report of %s does not count: %s; %d so far", inbox.key, reason, inbox.forged)
            self._on_forged(inbox.key, reason)

    def _hear(self, inbox: _Inbox, report: RunReport, way: str) -> None:
        """Only what is new is a sign of life: what is known, anybody can send again."""
        now, place, rank = self._monotonic(), _place(report), report.rank
        if way == "bus" and place > inbox.bus_newest.get(rank, BEGIN):
            inbox.bus_newest[rank], inbox.bus_at[rank] = place, now
        if place <= inbox.newest.get(rank, BEGIN):
            return
        inbox.newest[rank] = place
        for known in [k for k in inbox.heard_at if k[1] == rank]:
            del inbox.heard_at[known]
        inbox.heard_at[report.attempt, rank] = now

    def _look_for_gap(self, uid: str, inbox: _Inbox) -> None:
        found, before = _gap(inbox.done, inbox.pending, self._monotonic()), inbox.gap
        if found is None:
            self._gaps.discard(uid)
        elif before is not None and (before.after, before.place[0]) == (found.after, found.place[0]):
            found = replace(found, since=before.since)  # the same one, waited for already and perhaps given up
        else:
            self._gaps.add(uid)
        inbox.gap = found

    def _insert(self, inbox: _Inbox, report: RunReport) -> None:
        bisect.insort(inbox.pending, report, key=_place)
        inbox.pending = _thinned(inbox.pending)[-MAX_PENDING:]

    def _of_stranger(self, envelope: BusEnvelope, way: str) -> str:
        """Verified all the same: keys follow from the UID, and what is kept must not be anybody's."""
        try:
            self._verifier(envelope.run_uid).check_envelope(envelope)
        except SignatureError:
            return "forged"
        self._strangers.keep(envelope, way)
        return "unknown"

    def _verifier(self, uid: str) -> Verifier:
        return Verifier.derive(self._seed, uid, Role.REPORT, self._generation)


class _Strangers:
    """Reports of unknown runs, bounded in runs, per run, and in bytes; the run longest unheard of goes first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, deque[tuple[BusEnvelope, str]]] = OrderedDict()
        self._bytes = 0

    def keep(self, envelope: BusEnvelope, way: str) -> None:
        uid = envelope.run_uid
        kept = self._kept.setdefault(uid, deque())
        kept.append((envelope, way))
        self._bytes += envelope.ByteSize()
        self._kept.move_to_end(uid)
        if len(kept) > MAX_PER_STRANGER:
            self._bytes -= kept.popleft()[0].ByteSize()
        while len(self._kept) > MAX_STRANGERS or self._bytes > MAX_STRANGER_BYTES:
            self.pop(next(iter(self._kept)))

    def pop(self, uid: str) -> tuple[tuple[BusEnvelope, str], ...]:
        kept = tuple(self._kept.pop(uid, ()))
        self._bytes -= sum(envelope.ByteSize() for envelope, _ in kept)
        return kept


def _gap(done: Place, pending: list[RunReport], now: float) -> _Gap | None:
    """The first place behind which an event is missing. Of rank 0, whose reports the status follows."""
    known = done
    for report in pending:
        if report.rank:
            continue
        after = known[1] if known[0] == report.attempt else 0
        if report.previous_event_seq > after:
            return _Gap(after, _place(report), now)
        known = _place(report)
    return None


def _note_answer(inbox: _Inbox, report: RunReport) -> None:
    ack = report.ack
    if ack.participant != TOLARIA:
        return
    if inbox.signal != (ack.signal_id, ack.clear):
        inbox.signal, inbox.answered = (ack.signal_id, ack.clear), set()
    if len(inbox.answered) < MAX_PENDING:
        inbox.answered.add(report.pod_name)


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
