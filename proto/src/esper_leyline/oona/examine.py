"""What a connection is good for: the server behind it, its role, its clock, and what this user may do there.

Nothing of it changes anything. HELLO is open to every user; writing is asked for inside a transaction that is thrown
away, where Redis checks rights as it queues a command; reading is simply done.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis

from esper_leyline.oona.client import Oona, OonaDenied, OonaRefused, sound_answers
from esper_leyline.oona.housekeeping import PRESSURE_KEY
from esper_leyline.oona.streams import EMERGENCY, REPORTS, TELEMETRY, signals

MIN_VERSION: Final = (6, 2)
MAX_SKEW_S: Final = 2.0
_MAX_TEXT: Final = 64
_WRITTEN: Final = (REPORTS, TELEMETRY, EMERGENCY)
"""By a pod."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """Of one connection."""

    server: str
    """As it calls itself, with its version; `unknown` when it is too old to say."""
    version: tuple[int, int]
    replica: bool
    skew_s: float
    """How far this machine's clock is ahead of the server's, beyond what the exchange itself took."""
    denied: tuple[str, ...]
    """What this user needs and may not do."""

    @property
    def problem(self) -> str:
        """What is wrong and what would mend it; empty when nothing is. The clocks are no problem: nothing here goes
        by them."""
        if self.version < MIN_VERSION:
            needed = ".".join(map(str, MIN_VERSION))
            return f"the server is {self.server}; Redis {needed} or later, or Valkey, is needed"
        if self.replica:
            return f"{self.server} is a replica and takes no messages; the URL must lead to the primary"
        if self.denied:
            return f"this user may not: {', '.join(self.denied)}; its ACL rules are not those of its role"
        return ""


async def examine(oona: Oona, run_uid: str, *, wall: Callable[[], float] = time.time) -> Examination:
    """As a pod of the run. OonaUnavailable when the server does not answer."""
    async with oona.connection() as client:
        facts = await _hello(oona, client)
        version = facts.get("version", "")
        return Examination(
            server=f"{facts.get('server', 'a server')} {version}" if facts else "unknown",
            version=_numbers(version),
            replica=facts.get("role", "master") != "master",
            skew_s=await _skew(oona, client, wall),
            denied=(*await _unwritable(oona, client), *await _unreadable(oona, client, run_uid)),
        )


async def _hello(oona: Oona, client: Redis) -> dict[str, str]:
    try:
        answer = await oona.ask(_send(client, "HELLO"), oona.config.timeout_s)
    except OonaRefused:  # before 6.2 it is not known, or wants an argument
        return {}
    with sound_answers():
        pairs = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=True)
        return {_text(key): _text(value) for key, value in pairs}


async def _skew(oona: Oona, client: Redis, wall: Callable[[], float]) -> float:
    before = wall()
    answer = await oona.ask(client.time(), oona.config.timeout_s)
    after = wall()
    with sound_answers():
        seconds, microseconds = answer
        ahead = (before + after) / 2 - (int(seconds) + int(microseconds) / 1e6)
    doubt = max(0.0, after - before) / 2
    return 0.0 if abs(ahead) <= doubt else ahead - doubt if ahead > 0 else ahead + doubt


async def _unwritable(oona: Oona, client: Redis) -> list[str]:
    denied: list[str] = []
    if await _may_not(oona, _send(client, "MULTI")):
        return ["MULTI"]
    for stream in _WRITTEN:
        # Should the transaction be lost on the way, an entry with this id is refused, and an empty message is none.
        if await _may_not(oona, _send(client, "XADD", stream.name, "0-0", "e", b"")):
            denied.append(f"XADD {stream.name}")
        if await _may_not(oona, _send(client, "PUBLISH", stream.name, b"")):
            denied.append(f"PUBLISH {stream.name}")
    await oona.ask(_send(client, "DISCARD"), oona.config.timeout_s)
    return denied


async def _unreadable(oona: Oona, client: Redis, run_uid: str) -> list[str]:
    own = signals(run_uid).name
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        f"XREVRANGE {own}": lambda: client.xrevrange(own, count=1),
        f"XREAD {own}": lambda: client.xread({own: "0-0"}, count=1),
        f"HGETALL {PRESSURE_KEY}": lambda: client.hgetall(PRESSURE_KEY),
    }
    return [name for name, call in calls.items() if await _may_not(oona, call())]


async def _may_not(oona: Oona, call: Awaitable[Any]) -> bool:
    try:
        await oona.ask(call, oona.config.timeout_s)
    except OonaDenied:
        return True
    return False


def _send(client: Redis, *words: str | bytes) -> Awaitable[Any]:
    call: Awaitable[Any] = client.execute_command(*words)  # type: ignore[no-untyped-call]
    return call


def _text(value: object) -> str:
    return (value.decode(errors="replace") if isinstance(value, bytes) else str(value))[:_MAX_TEXT]


def _numbers(version: str) -> tuple[int, int]:
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
