"""What can go wrong with a request to the API server, by what the caller can do about it.

KubeError
 ├─ Conflict        somebody wrote in between: read again, decide again, at once
 ├─ AlreadyExists   the object is there: a success when it is ours
 ├─ NotFound        gone, or not there yet
 ├─ Gone            a resource version or page token is too old: list again
 ├─ Forbidden       not allowed now (RBAC, quota, a namespace that ends): tell the user, try again slowly
 ├─ Invalid         the server will never take this: tell the user, do not repeat it
 ├─ Throttled       the server asks for a pause of `retry_after_s`
 ├─ Transient       server trouble, timeout, broken connection: back off and repeat; the write may have happened
 └─ NotLeader       this process no longer holds the Lease; nothing was sent
"""

import math
from collections.abc import Mapping
from typing import Any

DEFAULT_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 300.0


class KubeError(Exception):
    """Base of the tree; `str()` is the server's own message where there is one."""

    def __init__(self, message: str, *, code: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        """HTTP status; 0 when no answer came."""
        self.reason = reason


class Conflict(KubeError):
    pass


class AlreadyExists(KubeError):
    pass


class NotFound(KubeError):
    pass


class Gone(KubeError):
    pass


class Forbidden(KubeError):
    pass


class Invalid(KubeError):
    pass


class NotLeader(KubeError):
    pass


class Throttled(KubeError):
    def __init__(self, message: str, *, retry_after_s: float, code: int = 429, reason: str = "TooManyRequests") -> None:
        super().__init__(message, code=code, reason=reason)
        self.retry_after_s = retry_after_s


class Transient(KubeError):
    @property
    def unreachable(self) -> bool:
        """No answer came: who asks again soon burdens nobody, and hears first that the server is back."""
        return self.code == 0


def from_status(code: int, status: Mapping[str, Any], retry_after: str | None = None) -> KubeError:
    """The error for an HTTP answer with that code, its Status body (may be empty) and Retry-After header."""
    reason = str(status.get("reason", ""))
    message = str(status.get("message", "")) or f"the API server answered {code}"
    wait_s = _wait_s(status, retry_after)
    if code == 429 or (code >= 500 and wait_s is not None):
        return Throttled(message, retry_after_s=wait_s or DEFAULT_RETRY_AFTER_S, code=code, reason=reason)
    if code >= 500 or code == 408:
        return Transient(message, code=code, reason=reason)
    if code == 409 and reason == "AlreadyExists":
        return AlreadyExists(message, code=code, reason=reason)
    kind = {401: Forbidden, 403: Forbidden, 404: NotFound, 409: Conflict, 410: Gone}.get(code, Invalid)
    return kind(message, code=code, reason=reason)


def _wait_s(status: Mapping[str, Any], header: str | None) -> float | None:
    details = status.get("details")
    value = header or (details.get("retryAfterSeconds") if isinstance(details, Mapping) else None)
    try:
        seconds = float(value) if value else math.nan
    except (TypeError, ValueError):
        return None  # an HTTP date or nonsense: the default pause
    return None if math.isnan(seconds) else min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
