"""Answers of Redis, read with suspicion: whoever holds it may answer anything, endlessly.

What is too large, too many or no answer at all is a failure of the transport, like silence: the connection is closed
and its caller goes on without it. Nothing here says whether a message counts; its signature does.
"""

import re
from functools import cache
from typing import Any, Final, TypeVar

from redis._parsers.resp2 import _AsyncRESP2Parser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

from esper_leyline.oona.streams import MAX_ENTRY_BYTES

MAX_BATCH: Final = 64
"""Entries that one call may ask for."""
MAX_ANSWER_BYTES: Final = (MAX_BATCH + 1) * MAX_ENTRY_BYTES
"""A batch of the largest entries, and what Redis writes around them."""
SMALL_ANSWER_BYTES: Final = 64 * 1024
"""Where nothing large is expected: ids, and emergency signals."""
MAX_ELEMENTS: Final = 50_000
"""Of one answer, at all depths."""
MAX_DEPTH: Final = 8

NONSENSE: Final = (ValueError, TypeError, LookupError, AttributeError)
"""What code meets that reads an answer of another shape than Redis gives: redis-py's own, and whose caller it is."""

_ENTRY_ID: Final = re.compile(rb"[0-9]{1,20}-[0-9]{1,20}")
_Parser = TypeVar("_Parser", bound="BoundedParser")


class BoundedParser(_AsyncRESP2Parser):
    """redis-py's own parser within limits; beyond them a ConnectionError, upon which redis-py closes the connection."""

    max_bytes: int = MAX_ANSWER_BYTES

    def __init__(self, socket_read_size: int) -> None:
        super().__init__(socket_read_size)
        self._bytes_left = self._elements_left = self._depth = 0

    async def read_response(self, disable_decoding: bool = False) -> Any:
        self._bytes_left, self._elements_left, self._depth = self.max_bytes, MAX_ELEMENTS, 0
        try:
            return await super().read_response(disable_decoding)
        except (ValueError, InvalidResponse) as error:
            raise RedisConnectionError(f"this is no answer of Redis: {str(error)[:80]}") from error

    async def _read_response(self, disable_decoding: bool = False) -> Any:
        self._elements_left -= 1
        self._depth += 1
        if self._elements_left < 0 or self._depth > MAX_DEPTH:
            raise RedisConnectionError(f"an answer has more than {MAX_ELEMENTS} elements or {MAX_DEPTH} levels")
        found = await super()._read_response(disable_decoding)
        self._depth -= 1
        return found

    async def _read(self, length: int) -> bytes:
        if length < 0:
            raise RedisConnectionError(f"an element of an answer has {length} bytes")
        self._spend(length)
        return await super()._read(length)

    async def _readline(self) -> bytes:
        line = await super()._readline()
        self._spend(len(line))
        return line

    def _spend(self, size: int) -> None:
        """Before the bytes are waited for, where their number is known."""
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise RedisConnectionError(f"an answer has more than {self.max_bytes} bytes")


@cache
def parser_for(max_bytes: int) -> type[BoundedParser]:
    """redis-py wants a class of its own for every limit."""
    return type("LimitedParser", (BoundedParser,), {"max_bytes": max_bytes})


def entry_id(value: object) -> str:
    """ValueError unless it is the id of an entry."""
    if not isinstance(value, bytes) or not _ENTRY_ID.fullmatch(value):
        raise ValueError(f"{value!r:.80} is no id of an entry")
    return value.decode()
