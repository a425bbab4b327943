"""Everything of Kopf: it watches the runs, and hands each event over to the operator's loop. No decision is made here.

Kopf runs in a thread and loop of its own: its parsing never delays a reconcile or a lease, and when it ends it cancels
only tasks of its own. OS signals stay with the main thread.
"""

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self, cast

import kopf
from esper_leyline.labels import GROUP, PLURAL, VERSION
from kubernetes.aio.client import Configuration

from esper_operator.kube.api import Object
from esper_operator.kube.client import Credentials
from esper_operator.model import RunKey

logger = logging.getLogger(__name__)

CREDENTIALS_LIFETIME = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class RunFeed:
    """Where events go; Kopf's memo. `put` and `drop` are called in `loop`."""

    loop: asyncio.AbstractEventLoop
    put: Callable[[Object], None]
    drop: Callable[[RunKey, str], None]

    def __copy__(self) -> Self:
        return self  # Kopf copies the memo for every object; this one is shared

    def take(self, event_type: str | None, item: Object) -> None:
        metadata = item["metadata"]
        if event_type == "DELETED":
            key = RunKey(metadata["namespace"], metadata["name"])
            self.loop.call_soon_threadsafe(self.drop, key, metadata["uid"])
        else:
            self.loop.call_soon_threadsafe(self.put, item)


class Backoffs:
    """Endless, jittered, at most 30 s. Kopf iterates anew for each request."""

    def __iter__(self) -> Iterator[float]:
        delay = 0.5
        while True:
            yield delay * (0.5 + random.random())
            delay = min(delay * 2, 30.0)


def registry() -> kopf.OperatorRegistry:
    """The complete list of handlers."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return connection((await Credentials.load()).configuration)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=handlers)
    async def on_run(event: kopf.RawEvent, memo: RunFeed, **_: Any) -> None:
        memo.take(event["type"], dict(event["object"]))

    return handlers


def connection(configuration: Configuration) -> kopf.ConnectionInfo:
    """The credentials that our own client uses, in Kopf's words; asked for again when they have aged."""
    scheme, _, token = str(configuration.api_key.get("BearerToken") or "").partition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert or None,
        insecure=not configuration.verify_ssl,
        scheme=scheme.capitalize() or None,
        token=token or None,
        certificate_path=configuration.cert_file or None,
        private_key_path=configuration.key_file or None,
        proxy_url=configuration.proxy or None,
        expiration=datetime.now(UTC) + CREDENTIALS_LIFETIME,
    )


def settings() -> kopf.OperatorSettings:
    """Chosen in the light of Kopf's known stalls, storms and leftovers."""
    chosen = kopf.OperatorSettings()
    chosen.networking.connect_timeout = 5
    chosen.networking.request_timeout = 30
    chosen.networking.error_backoffs = Backoffs()
    chosen.networking.enforce_retry_after = True
    chosen.watching.connect_timeout = 5
    chosen.watching.server_timeout = 300
    chosen.watching.client_timeout = 330
    chosen.watching.inactivity_timeout = 70
    chosen.watching.reconnect_backoff = 1.0
    chosen.watching.chunk_size = 500
    chosen.scanning.disabled = True
    chosen.posting.enabled = False
    chosen.peering.standalone = True
    chosen.persistence.finalizer = f"{GROUP}/operator"
    chosen.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP, v1=False)
    chosen.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP, key="last", v1=False)
    chosen.queueing.worker_limit = None
    chosen.queueing.idle_timeout = 1
    chosen.execution.max_workers = 4
    chosen.process.ultimate_exiting_timeout = 25
    return chosen


class KopfThread:
    """Runs `kopf.operator()`. `ended` completes when it ends, with its error if it had one."""

    def __init__(self, feed: RunFeed, namespaces: tuple[str, ...]) -> None:
        self._feed = feed
        self._namespaces = namespaces
        self._stop = threading.Event()
        self.ended: asyncio.Future[None] = feed.loop.create_future()
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def stop(self, timeout_s: float = 8.0) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, timeout_s)

    def _run(self) -> None:
        error: Exception | None = None
        try:
            asyncio.run(self._operate())
        except Exception as failure:  # broad: whatever ends this thread is handed to the main loop and ends the process
            logger.exception("Kopf ended with an error")
            error = failure
        if not self._feed.loop.is_closed():
            self._feed.loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    async def _operate(self) -> None:
        try:
            await kopf.operator(
                registry=registry(),
                settings=settings(),
                memo=self._feed,
                clusterwide=not self._namespaces,
                namespaces=self._namespaces,
                standalone=True,
                # Unused without peering; Kopf would look the user up by name, and a numeric user has none.
                identity=cast(Any, "esper-operator"),
                stop_flag=self._stop,
            )
        finally:
            self._stop.set()  # lets go the thread in which Kopf waits for it; this loop could not end before
