"""One Redis user per run: made when the run is first seen, removed when it is over or gone.

Redis keeps users in memory, and every server its own: one that was restarted or has taken over knows none. So all are
made again whenever the server is another than before; what was left by runs that ended meanwhile is removed then.
Only users whose password comes from this operator's seed are removed: another installation may use the same Redis.

Nothing waits for this: a pod whose user is not there yet tries again, and its reports are pulled meanwhile.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from esper_leyline.labels import BUS_USER_PREFIX, bus_user_name
from esper_leyline.oona import Backoff, Oona, OonaDenied, OonaUnavailable, acl
from esper_leyline.oona.client import sound_answers
from esper_leyline.signing import bus_password
from redis.asyncio import Redis

from esper_operator.metrics import Metrics
from esper_operator.model import RunKey

logger = logging.getLogger(__name__)

BATCH, PACE_S = 50, 0.05
"""Users per call, and between calls: a thousand a second at most, so that Redis has time for messages."""
CHECK_S = 5.0
"""Between two looks whether the server is still the same; a lost connection is a reason to look at once."""
LINGER_S = 60.0
"""After a run's end, for the last words of its pods."""
ROTATION_S = 300.0
"""After the start under new keys, for pods whose kubelet has yet to bring them the new password."""
DENIED_RETRY_S = 60.0
LIST_S = 5.0
MAX_USERS = 10_000
"""Each takes Redis about 3 KB."""


class BusUsers:
    def __init__(
        self,
        *,
        seed: bytes,
        generation: int,
        held: Callable[[], bool],
        monotonic: Callable[[], float],
        metrics: Metrics,
        on_denied: Callable[[RunKey, str], None] = lambda _key, _why: None,
    ) -> None:
        """`held` says whether this process leads; `on_denied(run, why)` hears that a run cannot have its user."""
        self._seed = seed
        self._generation = generation
        self._held = held
        self._monotonic = monotonic
        self._metrics = metrics
        self._on_denied = on_denied
        self._wanted: dict[str, RunKey] = {}
        self._due: dict[str, float] = {}
        """When a run's user is to be made, or removed, as `_wanted` says at that time."""
        self._both_until = monotonic() + ROTATION_S if generation > 1 else 0.0
        """The password before counts as well until then."""
        self._wake = asyncio.Event()
        self._full = False
        self.denied = ""
        """Why Redis lets this operator make no users; empty when it does."""

    # What the rest of the operator says

    def want(self, uid: str, key: RunKey) -> None:
        """The run lives."""
        if uid in self._wanted:
            return
        if len(self._wanted) >= MAX_USERS:
            if not self._full:
                logger.error("more than %d runs: those beyond get no user in Redis and do without it", MAX_USERS)
            self._full = True
            return
        self._full = False
        self._wanted[uid] = key
        self._schedule(uid, 0.0)
        if self.denied:
            self._on_denied(key, self.denied)

    def over(self, uid: str) -> None:
        """The run has finished; its pods may still speak."""
        if self._wanted.pop(uid, None) is not None:
            self._schedule(uid, LINGER_S)

    def forget(self, uid: str) -> None:
        """The run is gone."""
        if self._wanted.pop(uid, None) is not None or uid in self._due:
            self._schedule(uid, 0.0)

    def _schedule(self, uid: str, in_s: float) -> None:
        self._due[uid] = self._monotonic() + in_s
        self._wake.set()

    # What is done about it

    async def run(self, oona: Oona) -> None:
        """Endless. For the leader, once all runs are known: what is not known by then is a leftover."""
        watching = asyncio.create_task(self._watch(oona), name="bus users: connection")
        backoff = Backoff(first_s=oona.config.backoff_first_s, max_s=oona.config.backoff_max_s)
        try:
            while True:
                try:
                    async with oona.connection() as client:
                        await self._keep(oona, client, backoff)
                except OonaDenied as error:
                    self._deny(str(error))
                    await asyncio.sleep(DENIED_RETRY_S)
                except OonaUnavailable as error:
                    logger.debug("users of runs: Redis is away: %s", error)
                    await asyncio.sleep(backoff.next_s())
        finally:
            watching.cancel()

    async def _watch(self, oona: Oona) -> None:
        """Looks at once when Redis is back: it may be another one."""
        while True:
            await oona.wait_connected(True)
            self._wake.set()
            await oona.wait_connected(False)

    async def _keep(self, oona: Oona, client: Redis, backoff: Backoff) -> None:
        server = None
        while True:
            if self._held():
                self._end_rotation()
                found = (await oona.ask(client.info("server"), oona.config.timeout_s)).get("run_id")
                if server is None or found != server:
                    await self._all(oona, client)
                    server = found
                await self._some(oona, client)
                self._allow()
                backoff.reset()
            await self._pause()

    def _end_rotation(self) -> None:
        if self._both_until and self._monotonic() >= self._both_until:
            self._both_until = 0.0
            self._due |= dict.fromkeys(self._wanted, self._monotonic())
            logger.info("the passwords that runs had before the rotation count no more")

    async def _pause(self) -> None:
        now = self._monotonic()
        wait_s = min([CHECK_S, *(at - now for at in self._due.values())])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, wait_s)):
                await self._wake.wait()
        self._wake.clear()

    async def _all(self, oona: Oona, client: Redis) -> None:
        lines = await oona.ask(client.acl_list(), LIST_S)
        now = self._monotonic()
        with sound_answers():
            leftovers = self._leftovers(lines)
        for uid in leftovers:
            self._due.setdefault(uid, now)
        for uid in self._wanted:
            self._due[uid] = now
        logger.info("a Redis that has yet to know its users: %d runs", len(self._wanted))

    def _leftovers(self, lines: Sequence[str]) -> list[str]:
        """UIDs of users that were made with our seed and have no run."""
        users = [(name.removeprefix(BUS_USER_PREFIX), hashes) for name, hashes in map(acl.listed, lines)
                 if name.startswith(BUS_USER_PREFIX)]  # fmt: skip
        return [uid for uid, hashes in users if uid not in self._wanted and self._hashes(uid) & hashes]

    def _hashes(self, uid: str) -> frozenset[str]:
        generations = (g for g in (self._generation, self._generation - 1) if g >= 1)
        return frozenset(acl.hashed(bus_password(self._seed, uid, g)) for g in generations)

    async def _some(self, oona: Oona, client: Redis) -> None:
        while self._held():
            now = self._monotonic()
            batch = {uid: at for uid, at in self._due.items() if at <= now}
            batch = dict(list(batch.items())[:BATCH])
            if not batch:
                return
            made = [uid for uid in batch if uid in self._wanted]
            gone = [uid for uid in batch if uid not in self._wanted]
            await oona.ask(self._changes(client, made, gone), oona.config.timeout_s)
            for uid, at in batch.items():
                if self._due.get(uid) == at:  # nobody has changed their mind meanwhile
                    del self._due[uid]
            self._metrics.count("esper_bus_user_changes_total", "made", by=len(made))
            self._metrics.count("esper_bus_user_changes_total", "removed", by=len(gone))
            self._metrics.gauge("esper_bus_users", len(self._wanted))
            await asyncio.sleep(PACE_S)

    def _changes(self, client: Redis, made: list[str], gone: list[str]) -> Any:
        calls = client.pipeline(transaction=False)
        for uid in made:
            password, *before = self._passwords(uid)
            rules = acl.setuser(bus_user_name(uid), password, acl.run_rules(uid), *before)
            calls.execute_command("ACL SETUSER", *rules)
        if gone:
            calls.acl_deluser(*(bus_user_name(uid) for uid in gone))
        return calls.execute()

    def _passwords(self, uid: str) -> tuple[str, ...]:
        generations = (self._generation, self._generation - 1) if self._both_until else (self._generation,)
        return tuple(bus_password(self._seed, uid, g) for g in generations)

    def _deny(self, why: str) -> None:
        if not self.denied:
            logger.error(
                "Redis does not let this operator make a user for each run, so runs do without Redis: %s. Give its "
                "user ACL rights, or set redis.perRunUsers=false to share one user",
                why,
            )
        self.denied = why
        self._metrics.gauge("esper_bus_users_denied", 1)
        for key in self._wanted.values():
            self._on_denied(key, why)

    def _allow(self) -> None:
        if self.denied:
            logger.info("Redis lets this operator make users again")
        self.denied = ""
        self._metrics.gauge("esper_bus_users_denied", 0)
