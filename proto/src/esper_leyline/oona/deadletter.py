"""Dead letters: messages that no consumer could handle, with the reason, and the way back for them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError
from redis.asyncio import Redis

from esper_leyline.oona.client import Entry, Oona, entries_of
from esper_leyline.oona.streams import DEAD_LETTERS, FIELD, MAX_ENTRY_BYTES, STREAMS, Stream
from esper_leyline.v1.bus_pb2 import DeadLetter, DeadLetterReason

MAX_DETAIL_BYTES: Final = 256
MAX_READ: Final = 1_000
"""Letters per call."""


class ReplayError(ValueError):
    """A letter that cannot go back; the message says why."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A letter and its place."""

    id: str
    letter: DeadLetter


def letter(
    entry: Entry, *, reason: DeadLetterReason, detail: str, stream: Stream, group: str, consumer: str, attempts: int
) -> bytes:
    """A serialized DeadLetter about an entry."""
    found = DeadLetter(
        envelope=entry.raw[:MAX_ENTRY_BYTES],
        reason=reason,
        detail=detail.encode()[:MAX_DETAIL_BYTES].decode(errors="ignore"),
        stream=stream.name,
        entry_id=entry.id,
        group=group,
        consumer=consumer,
        delivery_attempts=attempts,
    )
    found.given_up_at.GetCurrentTime()
    return found.SerializeToString()


async def dead_letters(oona: Oona, *, after_id: str = "-", count: int = 100) -> list[Kept]:
    """Oldest first. OonaUnavailable when Redis cannot say."""
    async with oona.connection() as client:
        first = after_id if after_id == "-" else f"({after_id}"
        found = await oona.ask(
            client.xrange(DEAD_LETTERS.name, min=first, count=min(count, MAX_READ)), oona.config.timeout_s
        )
    return [kept for entry in entries_of(found) if (kept := _kept(entry)) is not None]


async def dead_letter(oona: Oona, letter_id: str) -> Kept | None:
    """None when there is none of that id. OonaUnavailable when Redis cannot say."""
    async with oona.connection() as client:
        return await _read(oona, client, letter_id)


async def _read(oona: Oona, client: Redis, letter_id: str) -> Kept | None:
    found = await oona.ask(client.xrange(DEAD_LETTERS.name, min=letter_id, max=letter_id), oona.config.timeout_s)
    return _kept(entries_of(found)[0]) if found else None


async def replay(oona: Oona, ids: Iterable[str]) -> dict[str, str]:
    """Sends letters back to their streams and removes them, each in one transaction; new entry id by old one.

    ReplayError for an id that is not there, and for a letter whose message is cut or whose stream is none of ours.
    """
    sent: dict[str, str] = {}
    async with oona.connection() as client:
        for one in ids:
            kept = await _read(oona, client, one)
            if kept is None:
                raise ReplayError(f"there is no dead letter {one}")
            stream = _home(kept)
            transaction = client.pipeline(transaction=True)
            transaction.xadd(stream.name, {FIELD: kept.letter.envelope}, maxlen=stream.max_length)
            transaction.publish(stream.name, kept.letter.envelope)
            transaction.xdel(DEAD_LETTERS.name, one)
            results = await oona.ask(transaction.execute(), oona.config.timeout_s)
            sent[one] = bytes(results[0]).decode()
    return sent


def _home(kept: Kept) -> Stream:
    stream = STREAMS.get(kept.letter.stream)
    if stream is None or stream is DEAD_LETTERS:
        raise ReplayError(
            f"dead letter {kept.id} is from {kept.letter.stream[:64]!r}, to which nothing can be replayed"
        )
    if len(kept.letter.envelope) >= MAX_ENTRY_BYTES:
        raise ReplayError(f"dead letter {kept.id} was too large to be kept whole")
    return stream


def _kept(entry: Entry) -> Kept | None:
    try:
        return Kept(entry.id, DeadLetter.FromString(entry.raw))
    except DecodeError:
        return None  # somebody else's
