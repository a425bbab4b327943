"""Random states as bytes: read from memory where that is known to be the same, asked for otherwise."""

import random
import struct
from collections.abc import Callable, Iterator

import pytest
from esper_runtime.tolaria import rng

DRAWS: list[Callable[[], object]] = [
    random.random,
    lambda: random.gauss(0.0, 1.0),
    lambda: random.getrandbits(4096),
    lambda: random.shuffle(list(range(50))),
    lambda: random.seed(7),
    lambda: random.seed("a text"),
    lambda: random.setstate(random.Random(3).getstate()),
]


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = random.getstate()
    yield
    random.setstate(before)


def told() -> bytes:
    _, words, gauss = random.getstate()
    return struct.pack("<625IBd", *words, gauss is not None, gauss or 0.0)


def test_what_is_read_is_what_python_tells() -> None:
    dice = random.Random(1)
    for _ in range(500):
        dice.choice(DRAWS)()
        assert rng.capture()["python"] == told()


def test_a_generator_whose_memory_looks_otherwise_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr(rng._Python, "_read", lambda _: bytes(2509))
        unknown = rng._Python()
    assert unknown._address == 0
    for draw in DRAWS:
        draw()
        assert unknown.capture() == told()


def test_what_was_captured_goes_on_alike() -> None:
    random.gauss(0.0, 1.0)  # half of a pair is kept
    states = rng.capture()
    expected = [random.gauss(0.0, 1.0) for _ in range(5)]
    rng.restore(states)
    assert [random.gauss(0.0, 1.0) for _ in range(5)] == expected
