"""Leader election by a coordination.k8s.io Lease, with the rules of client-go.

Others' validity is judged by when *we* saw their record change, on the monotonic clock; the times in the record are
for people. We may write for RENEW_DEADLINE_S after the start of our last renewal; others wait LEASE_DURATION_S after
they saw it, so there are five seconds in which nobody may. Losing the Lease ends the process: a leader never becomes
a standby again. `LeaseThread` renews from a thread with a loop and a client of its own, so that a busy main loop does
not cost the leadership.

A container that is restarted in its pod finds the Lease held by the container before it. That one is dead, since a pod
runs one at a time, so the Lease is taken over without waiting.
"""

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from esper_operator.kube.api import LEASES, KubeApi, Object
from esper_operator.kube.errors import AlreadyExists, Conflict, KubeError, NotFound, Transient

logger = logging.getLogger(__name__)

LEASE_DURATION_S = 15.0
RENEW_DEADLINE_S = 10.0
RETRY_PERIOD_S = 2.0
UNREACHABLE_RETRY_S = 0.5
SEPARATOR = "_"


def identity_in(pod: str) -> str:
    """A holder's identity: where it runs, and what tells it apart from the container before it."""
    return f"{pod}{SEPARATOR}{uuid.uuid4().hex[:12]}"


@dataclass(slots=True)
class _Seen:
    """The record as last read, and when we first saw it like that."""

    holder: str
    version: str
    transitions: int
    duration_s: float
    at: float


class Elector:
    """Acquires and keeps one Lease. `run()` returns only when it was held and is lost."""

    def __init__(
        self,
        api: KubeApi,
        *,
        namespace: str,
        name: str,
        identity: str,
        on_acquired: Callable[[], None],
        pod: str = "",
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`pod`: name of the pod that this process is the only one to run in; `identity` must be of `identity_in`."""
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._on_acquired = on_acquired
        self._pod = pod
        self._monotonic = monotonic
        self._sleep = sleep
        self._seen: _Seen | None = None
        self._valid_until = float("-inf")
        self._released = False
        self.term = 0
        """leaseTransitions of our leadership: the fencing term of emergency signals."""

    @property
    def held(self) -> bool:
        """May this process write now?"""
        return not self._released and self._monotonic() < self._valid_until

    @property
    def holder(self) -> str:
        return self._seen.holder if self._seen else ""

    async def run(self) -> None:
        await self._acquire()
        logger.info("leading as %s, term %d", self._identity, self.term)
        self._on_acquired()
        await self._keep()

    async def release(self) -> None:
        """Gives the Lease up, so that a standby takes over in one retry period. A failure only costs time."""
        was_held, self._released = self.held, True
        if not was_held or self._seen is None:
            return
        body = self._record(self._seen.transitions, holder="", duration_s=1)
        try:
            await self._patch(body, self._seen.version)
        except KubeError as error:
            logger.warning("the Lease could not be released: %s", error)

    async def _acquire(self) -> None:
        while True:
            started = self._monotonic()
            try:
                if await self._take(started):
                    self._valid_until = started + RENEW_DEADLINE_S
                    return
            except KubeError as error:
                logger.warning("Lease %s/%s: %s", self._namespace, self._name, error)
                if isinstance(error, Transient) and error.unreachable:
                    await self._sleep(UNREACHABLE_RETRY_S)
                    continue
            await self._sleep(RETRY_PERIOD_S)

    async def _keep(self) -> None:
        while self.held:
            await self._sleep(RETRY_PERIOD_S)
            started = self._monotonic()
            if not self.held:
                break  # woken too late (a stopped process): somebody else may lead already
            try:
                async with asyncio.timeout(self._valid_until - started):
                    if not await self._renew(started):
                        break
            except (KubeError, TimeoutError) as error:
                logger.warning("the Lease was not renewed: %s", error)
                continue
            self._valid_until = started + RENEW_DEADLINE_S

    async def _take(self, now: float) -> bool:
        """One attempt to become the holder; False while another one is, or was quicker."""
        try:
            seen = self._look(await self._api.get(LEASES, self._name, namespace=self._namespace), now)
            if not self._free(seen, now):
                return False
            term = seen.transitions + 1
            self._look(await self._patch(self._record(term), seen.version), now)
        except NotFound:
            term = 1
            try:
                self._look(await self._api.create(LEASES, self._manifest()), now)
            except AlreadyExists:
                return False
        except Conflict:
            return False
        self.term = term
        return True

    def _free(self, seen: _Seen, now: float) -> bool:
        """Nobody holds it, its holder is dead, or has not renewed it in time."""
        predecessor = bool(self._pod) and seen.holder.rpartition(SEPARATOR)[0] == self._pod
        return seen.holder in ("", self._identity) or predecessor or now >= seen.at + seen.duration_s

    async def _renew(self, now: float) -> bool:
        """False when the Lease is not ours any more. A record that somebody else merely touched is read again."""
        seen = self._seen
        assert seen is not None
        try:
            self._look(await self._patch(self._record(self.term), seen.version), now)
        except NotFound:
            return False
        except Conflict:
            seen = self._look(await self._api.get(LEASES, self._name, namespace=self._namespace), now)
            if seen.holder != self._identity:
                return False
            self._look(await self._patch(self._record(self.term), seen.version), now)
        return True

    def _manifest(self) -> Object:
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"namespace": self._namespace, "name": self._name},
            "spec": self._record(1)["spec"],
        }

    def _look(self, lease: Object, now: float) -> _Seen:
        """Remembers the record; one that has not changed keeps the time of its first sight."""
        spec = lease.get("spec") or {}
        version = str(lease["metadata"]["resourceVersion"])
        if self._seen is None or self._seen.version != version:
            self._seen = _Seen(
                holder=spec.get("holderIdentity") or "",
                version=version,
                transitions=int(spec.get("leaseTransitions") or 0),
                duration_s=float(spec.get("leaseDurationSeconds") or LEASE_DURATION_S),
                at=now,
            )
        return self._seen

    def _record(
        self, transitions: int, *, holder: str | None = None, duration_s: int = int(LEASE_DURATION_S)
    ) -> Object:
        stamp = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec: Object = {
            "holderIdentity": self._identity if holder is None else holder,
            "leaseDurationSeconds": duration_s,
            "leaseTransitions": transitions,
            "renewTime": stamp,
        }
        if self._seen is None or self._seen.holder != self._identity:
            spec["acquireTime"] = stamp
        return {"spec": spec}

    async def _patch(self, body: Object, version: str) -> Object:
        guarded = {**body, "metadata": {"resourceVersion": version}}
        return await self._api.patch(LEASES, self._name, namespace=self._namespace, body=guarded)


class LeaseThread:
    """Runs an Elector in a daemon thread. Losing a held Lease calls `on_lost`, which must not return."""

    def __init__(
        self,
        make_elector: Callable[[Callable[[], None]], Awaitable[tuple[Elector, Callable[[], Awaitable[None]]]]],
        *,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        """`make_elector(on_acquired)` runs in the thread's loop; it returns the elector and how to close its client."""
        self._make = make_elector
        self._on_lost = on_lost or _die
        self._main = asyncio.get_running_loop()
        self._loop = asyncio.new_event_loop()
        self._elector: Elector | None = None
        self._stopping: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self.acquired = asyncio.Event()
        """Set in the main loop once this process leads."""
        self.failed: asyncio.Future[None] = self._main.create_future()
        """Ends only with the error that ended the thread before its time."""
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    @property
    def held(self) -> bool:
        return self._elector is not None and self._elector.held

    @property
    def term(self) -> int:
        return self._elector.term if self._elector else 0

    def start(self) -> None:
        self._thread.start()

    async def stop(self, timeout_s: float = 5.0) -> None:
        """Releases the Lease and ends the thread."""
        if self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
        await asyncio.to_thread(self._thread.join, timeout_s)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._elect())
        except Exception as error:  # broad: whatever ends this thread is handed to the main loop and ends the process
            logger.exception("the Lease's thread ended with an error")
            self._main.call_soon_threadsafe(self._fail, error)
        finally:
            self._loop.close()

    def _acquired(self) -> None:
        self._main.call_soon_threadsafe(self.acquired.set)

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    async def _elect(self) -> None:
        self._stopping = asyncio.Event()
        self._elector, close = await self._make(self._acquired)
        try:
            election = asyncio.create_task(self._elector.run())
            stop = asyncio.create_task(self._stopping.wait())
            await asyncio.wait((election, stop), return_when=asyncio.FIRST_COMPLETED)
            if election.done():
                election.result()
                self._on_lost()
            election.cancel()
            stop.cancel()
            await asyncio.gather(election, stop, return_exceptions=True)
            await self._elector.release()
        finally:
            await close()


def _die() -> None:
    logger.critical("the Lease is lost: this process ends at once")
    logging.shutdown()
    os._exit(1)
