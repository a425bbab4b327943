"""The log gives back a prefix of what was appended, whatever happened to its end; and goes on from there."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from esper_runtime.checkpoint import Wal, WalState
from esper_runtime.checkpoint.wal import HEADER_BYTES, Kind
from hypothesis import HealthCheck, given, settings

RECORDS: list[tuple[Kind, dict[str, Any]]] = [
    (Kind.ROLLBACK, {"cause": "NonFiniteLoss", "from_step": 12, "to_step": 10, "time": 5.0}),
    (Kind.SKIP, {"positions": [12]}),
    (Kind.FAULT, {"key": "NonFiniteLoss@12"}),
    (Kind.LEARNING_RATE, {"scale": 0.5}),
    (Kind.RESTART, {"cause": "Hang", "step": 20}),
    (Kind.CHECKPOINT_FAILURE, {"step": 30, "error": "no space"}),
]


def written(path: Path) -> tuple[bytes, list[int], list[WalState]]:
    """The log's bytes, where each record ends, and the state after each (both with the empty log first)."""
    wal = Wal(path)
    ends, states = [0], [wal.replay()]
    for kind, fields in RECORDS:
        states.append(wal.append(kind, **fields))
        ends.append(path.stat().st_size)
    wal.close()
    return path.read_bytes(), ends, states


def replayed(path: Path, raw: bytes) -> Wal:
    path.write_bytes(raw)
    wal = Wal(path)
    wal.replay()
    return wal


def test_a_log_torn_at_every_byte_gives_the_whole_records_before(tmp_path: Path):
    raw, ends, states = written(tmp_path / "wal.log")
    for cut in range(len(raw) + 1):
        whole = sum(end <= cut for end in ends) - 1
        wal = replayed(tmp_path / "wal.log", raw[:cut])
        assert wal.state == states[whole], cut
        assert wal.cut_bytes == cut - ends[whole]
        again = wal.append(Kind.RESTART)
        wal.close()
        reader = Wal(tmp_path / "wal.log")
        assert reader.replay() == again, cut
        assert reader.cut_bytes == 0
        reader.close()


def test_a_flip_of_every_byte_cuts_there(tmp_path: Path):
    raw, ends, states = written(tmp_path / "wal.log")
    for at in range(len(raw)):
        spoiled = raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :]
        whole = sum(end <= at for end in ends) - 1
        wal = replayed(tmp_path / "wal.log", spoiled)
        assert wal.state == states[whole], at
        assert wal.cut_bytes == len(raw) - ends[whole]
        wal.close()


def test_records_of_another_log_do_not_link(tmp_path: Path):
    raw, ends, states = written(tmp_path / "one.log")
    other = Wal(tmp_path / "two.log", monotonic_ns=lambda: 1)
    other.append(Kind.RESTART)
    other.append(Kind.RESTART)
    other.close()
    foreign = (tmp_path / "two.log").read_bytes()
    half = len(foreign) // 2
    wal = replayed(tmp_path / "mixed.log", raw[: ends[1]] + foreign[half:])
    assert wal.state == states[1]
    wal.close()


def test_records_out_of_order_or_twice_are_not_believed(tmp_path: Path):
    raw, ends, states = written(tmp_path / "wal.log")
    pieces = [raw[begin:end] for begin, end in pairwise(ends)]
    for order, whole in (([0, 2, 1, 3], 1), ([0, 0, 1], 1), ([1, 0], 0), ([0, 1, 3], 2)):
        wal = replayed(tmp_path / "wal.log", b"".join(pieces[index] for index in order))
        assert wal.state == states[whole], order
        wal.close()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ops=st.lists(
        st.one_of(
            st.just((Kind.RESTART, {})),
            st.builds(lambda key: (Kind.FAULT, {"key": key}), st.text(max_size=20)),
            st.builds(lambda scale: (Kind.LEARNING_RATE, {"scale": scale}), st.floats(0.01, 1.0)),
            st.builds(lambda p: (Kind.SKIP, {"positions": p}), st.lists(st.integers(0, 2**53), max_size=5)),
        ),
        max_size=12,
    ),
    tail=st.binary(max_size=2 * HEADER_BYTES),
    reopen=st.integers(0, 3),
)
def test_any_history_survives_reopening_and_a_foreign_tail(tmp_path: Path, ops: list[Any], tail: bytes, reopen: int):
    path = tmp_path / "wal.log"
    path.unlink(missing_ok=True)
    expected = WalState()
    wal = Wal(path)
    for index, (kind, fields) in enumerate(ops):
        wal.append(kind, **fields)
        expected = expected.after(kind, fields)
        if reopen and index % reopen == 0:
            wal.close()
            wal = Wal(path)
    wal.close()
    with path.open("ab") as file:
        file.write(tail)
    wal = Wal(path)
    assert wal.replay() == expected
    assert wal.cut_bytes == len(tail)
    wal.close()


def test_noise_is_an_empty_log(tmp_path: Path):
    rng = random.Random(1)
    for _ in range(200):
        wal = replayed(tmp_path / "wal.log", rng.randbytes(rng.randrange(2000)))
        assert wal.state == WalState()
        wal.close()
