"""What somebody with every right on Redis and no key may make of a sealed envelope, and servers that are no Redis."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import MappingProxyType

from esper_leyline.signing import Role, SigningKey, signed_bytes
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType
from google.protobuf.message import DecodeError

from tests.support.streams import hang_up

STRANGER = b"z" * 32
OTHER_RUN = "22222222-6f0c-4c7f-9a51-0d1f1b5c8e11"


def changed(good: BusEnvelope, **fields: object) -> BusEnvelope:
    made = BusEnvelope.FromString(good.SerializeToString())
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def signed_by(good: BusEnvelope, key: SigningKey, key_id: str = "") -> BusEnvelope:
    """The same message under another key, which may claim to be the right one."""
    made = changed(good, key_id=key_id or key.key_id)
    made.signature = key.private.sign(signed_bytes(made))
    return made


def under_other_keys(good: BusEnvelope, seed: bytes, run_uid: str, roles: tuple[Role, ...]) -> dict[str, BusEnvelope]:
    """Keys that the adversary has or could have: its own, another run's, those of other roles in this run."""
    keys = {
        "own key": SigningKey.derive(STRANGER, run_uid, Role.OPERATOR),
        "another run's key": SigningKey.derive(seed, OTHER_RUN, Role.OPERATOR),
        "another run's report key": SigningKey.derive(seed, OTHER_RUN, Role.REPORT),
        **{f"{role} key": SigningKey.derive(seed, run_uid, role) for role in roles},
    }
    made = {}
    for name, key in keys.items():
        made[name] = signed_by(good, key)
        made[f"{name}, said to be the right one"] = signed_by(good, key, good.key_id)
    return made


def rewritten(good: BusEnvelope, payload: bytes) -> dict[str, BusEnvelope]:
    """The signature of a good message on something else."""
    future = changed(good, payload=payload)
    future.issued_at.FromDatetime(datetime(2100, 1, 1, tzinfo=UTC))
    return {
        "another payload": changed(good, payload=payload),
        "another payload, dated in the future": future,
        "no payload": changed(good, payload=b""),
        "no signature": changed(good, signature=b""),
        "half a signature": changed(good, signature=good.signature[:32]),
        "a signature of zeros": changed(good, signature=bytes(64)),
        "no key id": changed(good, key_id=""),
        "another run": changed(good, run_uid=OTHER_RUN),
        "no run": changed(good, run_uid=""),
        "another nonce": changed(good, nonce=os.urandom(16)),
        "another type": changed(good, message_type=BusMessageType.BUS_MESSAGE_TYPE_TELEMETRY),
        "no type": changed(good, message_type=BusMessageType.BUS_MESSAGE_TYPE_UNSPECIFIED),
        "a payload that goes on": changed(good, payload=good.payload + payload),
    }


def truncated(raw: bytes) -> Iterator[bytes]:
    """Every beginning of it, from nothing."""
    return (raw[:length] for length in range(len(raw)))


def flipped(raw: bytes, bits: tuple[int, ...] = tuple(range(8))) -> Iterator[bytes]:
    """One bit of one byte, for every byte."""
    for at, bit in itertools.product(range(len(raw)), bits):
        yield raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]


def same_meaning(raw: bytes, good: BusEnvelope) -> bool:
    """Changed where the signature does not reach, which decides nothing: it is the good message itself."""
    try:
        found = BusEnvelope.FromString(raw)
    except DecodeError:
        return False
    return found.signature == good.signature and signed_bytes(found) == signed_bytes(good)


# Servers


def _bulk(size: int) -> bytes:
    return b"$%d\r\n" % size


LIES: Mapping[str, Callable[[], Iterator[bytes]]] = MappingProxyType(
    {
        "nothing": lambda: iter(()),
        "noise": lambda: iter([os.urandom(4096)] * 4),
        "another protocol": lambda: iter([b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"]),
        "OK to everything": lambda: itertools.repeat(b"+OK\r\n", 64),
        "numbers": lambda: itertools.repeat(b":1\r\n", 64),
        "empty lists": lambda: itertools.repeat(b"*0\r\n", 64),
        "nil": lambda: itertools.repeat(b"$-1\r\n", 64),
        "errors": lambda: itertools.repeat(b"-ERR \xff\xfe no\r\n", 64),
        "a length that is no number": lambda: iter([b"$abc\r\n", b"*abc\r\n"]),
        "a length below zero": lambda: itertools.repeat(b"*3\r\n$-7\r\n$-7\r\n$-7\r\n", 64),
        "a stream of the wrong shape": lambda: itertools.repeat(b"*1\r\n*2\r\n$1\r\nx\r\n*1\r\n*2\r\n:5\r\n:6\r\n", 64),
        "an id that is none": lambda: itertools.repeat(b"*1\r\n*2\r\n$2\r\nab\r\n*2\r\n$1\r\ne\r\n$1\r\nx\r\n", 64),
        "one value without end": lambda: itertools.chain([_bulk(1 << 40)], itertools.repeat(b"x" * 65536)),
        "one line without end": lambda: itertools.chain([b"+"], itertools.repeat(b"x" * 65536)),
        "a list without end": lambda: itertools.chain([b"*1099511627776\r\n"], itertools.repeat(b":1\r\n" * 16384)),
        "a list of large values": lambda: itertools.chain(
            [b"*1099511627776\r\n"], itertools.repeat(_bulk(1 << 20) + b"x" * (1 << 20) + b"\r\n")
        ),
        "lists in lists": lambda: itertools.repeat(b"*1\r\n" * 16384),
    }
)
"""What a server answers to whatever is asked, by name."""


class Liar:
    """Listens as Redis does. `tells` names the lie; connections of an earlier one are cut when it changes."""

    def __init__(self) -> None:
        self._tells = "nothing"
        self._changed = asyncio.Event()
        self.asked = 0
        """Questions since the lie changed."""
        self.url = ""
        self._served: set[asyncio.Task[None]] = set()

    def tell(self, lie: str) -> None:
        self._tells, self.asked = lie, 0
        self._changed.set()
        self._changed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._served.add(task)
        task.add_done_callback(self._served.discard)

    async def close(self) -> None:
        """Hangs up, and leaves no connection behind."""
        self.tell("nothing")
        await asyncio.gather(*self._served, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended = asyncio.create_task(self._changed.wait())
        answering = asyncio.create_task(self._answer(reader, writer))
        try:
            await asyncio.wait((ended, answering), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (ended, answering):
                task.cancel()
            await asyncio.gather(ended, answering, return_exceptions=True)
            await hang_up(writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            self.asked += 1
            for part in LIES[self._tells]():
                writer.write(part)
                await writer.drain()


@asynccontextmanager
async def lying() -> AsyncIterator[Liar]:
    liar = Liar()
    server = await asyncio.start_server(liar.serve, "127.0.0.1", 0)
    liar.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield liar
    finally:
        server.close()
        await liar.close()
