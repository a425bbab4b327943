"""Who may do what in Redis: the rules of each role as arguments of ACL SETUSER. Pure.

A rule names the commands that the role's code sends, the keys that these touch, and nothing else. Where one list of
keys would let a command too far (who may publish everywhere may listen to its own channel only), the command has a
selector of its own. Redis 7 or Valkey is needed for both.

What rules cannot do: XADD trims as its caller says, so a run could shorten the streams that it may add to. Reports
are numbered and kept by their pod, so what is lost that way is noticed and pulled.
"""

import hashlib
import re
from typing import Final

from esper_leyline.labels import bus_user_name
from esper_leyline.oona.housekeeping import PRESSURE_KEY
from esper_leyline.oona.streams import DEAD_LETTERS, EMERGENCY, NORMAL, REPORTS, TELEMETRY, signals

OPERATOR: Final = "operator"
NISSA: Final = "nissa"
NISSA_SEEN: Final = "oona.seen.nissa."

_ANYBODY: Final = ("+ping", "+time", "+select", "+multi", "+exec", "+discard")
"""select: a URL may name a database."""
_UID: Final = re.compile("[0-9A-Za-z-]{1,64}")
_OUT: Final = (REPORTS, TELEMETRY, EMERGENCY, NORMAL)
_IN: Final = (TELEMETRY, EMERGENCY, NORMAL)
_GROUP: Final = (
    "+exists", "+xinfo|groups", "+xgroup|create", "+xreadgroup", "+xpending", "+xautoclaim", "+xack",
)  # fmt: skip
_USERS: Final = ("+acl|setuser", "+acl|deluser", "+acl|list", "+acl|getuser", "+acl|whoami")
_ALL: Final = (
    "+xadd", "+xread", "+xrange", "+xrevrange", "+xlen", "+xdel", "+xtrim",
    *_GROUP, "+xinfo|stream", "+xinfo|consumers", "+xgroup|delconsumer",
    "+publish", "+subscribe", "+unsubscribe",
    "+set", "+get", "+del", "+expire", "+pexpire", "+ttl", "+hset", "+hgetall",
    "+info",
)  # fmt: skip
"""What this package sends in any role."""


def run_user(run_uid: str) -> str:
    """Name of a run's own user. ValueError for a UID that would be more than a name in a rule."""
    if not _UID.fullmatch(run_uid):
        raise ValueError(f"{run_uid[:80]!r} is no UID")
    return bus_user_name(run_uid)


def run_rules(run_uid: str) -> tuple[str, ...]:
    """Of the pods of one run: they add to the common streams, and read what is meant for them alone."""
    run_user(run_uid)
    own = signals(run_uid).name
    out = [stream.name for stream in _OUT]
    return (
        *_ANYBODY,
        "+xadd",
        *(f"%W~{name}" for name in out),
        _selector("+publish", *(f"&{name}" for name in out)),
        _selector("+xread", "+xrevrange", f"%R~{own}"),
        _selector("+subscribe", "+unsubscribe", f"&{own}"),
        _selector("+hgetall", f"%R~{PRESSURE_KEY}"),
    )


def nissa_rules() -> tuple[str, ...]:
    """Of who consumes telemetry in groups."""
    return (
        *_ANYBODY,
        *_GROUP,
        *(f"%RW~{stream.name}" for stream in _IN),
        _selector("+set", "+del", f"%RW~{NISSA_SEEN}*"),
        _selector("+xadd", f"%W~{DEAD_LETTERS.name}"),
    )


def operator_rules(*, users: bool = True) -> tuple[str, ...]:
    """Of who keeps the fabric. With `users` it makes and removes those of runs, which is the power to become anybody:
    its password is as good as an administrator's."""
    return (*_ANYBODY, *_ALL, *(_USERS if users else ()), "~oona.*", "&oona.*")


def hashed(password: str) -> str:
    """A password as a rule; Redis keeps no more of it than this either."""
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"


def setuser(name: str, password: str, rules: tuple[str, ...], *also: str) -> tuple[str, ...]:
    """Arguments of ACL SETUSER that make the user exactly so, whatever it was before. `also`: passwords that count
    as well."""
    return (name, "reset", "on", *map(hashed, (password, *also)), *rules)


def listed(line: str) -> tuple[str, frozenset[str]]:
    """Name and password hashes of a user, as rules, from a line of ACL LIST."""
    words = line.split()
    if len(words) < 2 or words[0] != "user":
        return "", frozenset()
    return words[1], frozenset(word for word in words[2:] if word.startswith("#"))


def _selector(*rules: str) -> str:
    return f"({' '.join(rules)})"
