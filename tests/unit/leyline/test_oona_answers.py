"""Whatever a server answers, its client gets a value or an error of the transport, within bounds."""

import asyncio
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest
from esper_leyline.oona import OonaUnavailable
from esper_leyline.oona.answers import MAX_ELEMENTS, SMALL_ANSWER_BYTES, entry_id, parser_for
from esper_leyline.oona.client import Entry, entries_of
from hypothesis import given, settings
from hypothesis import strategies as st
from redis._parsers.encoders import Encoder
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError


def answer(raw: bytes, limit: int = SMALL_ANSWER_BYTES) -> Any:
    """What redis-py makes of bytes after which the server falls silent for good."""

    async def read() -> Any:
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        parser = parser_for(limit)(65536)
        parser.on_connect(SimpleNamespace(_reader=reader, encoder=Encoder("utf-8", "strict", False)))
        return await parser.read_response()

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"+OK\r\n", b"OK"),
        (b":7\r\n", 7),
        (b"$3\r\nabc\r\n", b"abc"),
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"*0\r\n", []),
        (b"*2\r\n*1\r\n:1\r\n$0\r\n\r\n", [[1], b""]),
    ],
)
def test_an_answer_is_what_it_says(raw: bytes, value: Any) -> None:
    assert answer(raw) == value


def test_an_error_of_the_server_is_an_answer() -> None:
    assert isinstance(answer(b"-ERR no\r\n"), ResponseError)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"HTTP/1.1 400\r\n", "no answer of Redis"),
        (b"$abc\r\n", "no answer of Redis"),
        (b"*abc\r\n", "no answer of Redis"),
        (b":x\r\n", "no answer of Redis"),
        (b"\r\n", "no answer of Redis"),
        (b"x" * 200_000, "no answer of Redis"),
        (b"$-2\r\nab\r\n", "has -2 bytes"),
        (b"*1\r\n" * 100, "levels"),
        (b"*99999999\r\n" + b":1\r\n" * (MAX_ELEMENTS + 1), "elements"),
        (b"$70000\r\n" + b"x" * 70_000 + b"\r\n", "more than 65536 bytes"),
        (b"$1099511627776\r\n", "more than 65536 bytes"),
        (b"*9\r\n" + (b"$9000\r\n" + b"x" * 9000 + b"\r\n") * 9, "more than 65536 bytes"),
        (b"$3\r\nab", "Connection closed"),
        (b"", "Connection closed"),
    ],
)
def test_what_is_none_or_too_much_ends_the_connection(raw: bytes, words: str) -> None:
    limit = 10**7 if "elements" in words else SMALL_ANSWER_BYTES
    with pytest.raises(RedisConnectionError, match=words):
        answer(raw, limit)


def test_a_large_value_is_refused_before_it_is_read() -> None:
    tracemalloc.start()
    with pytest.raises(RedisConnectionError):
        answer(b"$1099511627776\r\n" + b"x" * 1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000


PIECES = st.sampled_from(
    [
        b"*",
        b"$",
        b":",
        b"+",
        b"-",
        b"1",
        b"2",
        b"0",
        b"-1",
        b"9999999999",
        b"\r\n",
        b"\r",
        b"\n",
        b"x",
        b"\xff",
        b"ERR ",
    ]
)


@settings(max_examples=300, deadline=None)
@given(raw=st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=60).map(b"".join)))
def test_any_bytes_are_a_value_or_an_error_of_the_transport(raw: bytes) -> None:
    try:
        answer(raw)
    except RedisConnectionError:
        return


SHAPES = st.recursive(
    st.one_of(st.none(), st.integers(), st.binary(max_size=8), st.just(b"1-2"), st.just(b"e")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.binary(max_size=2), inner, max_size=2)),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(found=SHAPES)
def test_entries_of_any_shape_are_entries_or_unavailable(found: Any) -> None:
    try:
        entries = entries_of(found)
    except OonaUnavailable:
        return
    assert all(entry.order >= (0, 0) and isinstance(entry.raw, bytes) for entry in entries)


def test_an_entry_without_our_field_keeps_its_place() -> None:
    assert entries_of([(b"5-1", {b"x": b"y"}), (b"5-2", None)]) == [Entry("5-1", b""), Entry("5-2", b"")]


@pytest.mark.parametrize(
    "value", [b"", b"1", b"1-", b"-1", b"1-2-3", b"a-b", b"1-2\n", "1-2", 12, None, b"9" * 21 + b"-1"]
)
def test_what_is_no_id_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="is no id of an entry"):
        entry_id(value)
