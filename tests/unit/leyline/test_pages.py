"""Shared-memory pages: layout, limits, and what a reader sees of an unfinished write."""

import math
import struct
from pathlib import Path

import pytest
from esper_leyline.pages import (
    EMERGENCY_ORDER_WORD,
    MAX_SLOTS,
    SLOT_BYTES,
    EmergencyPage,
    EmergencyRecord,
    Heartbeat,
    Page,
    PageError,
)

SEVEN = (1, 2, 3, 4, 5, 6, 7)
TOP = 2**64 - 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "page"


def test_the_layout_is_eight_little_endian_words_a_slot(path: Path) -> None:
    page = Page.create(path, slots=2)
    page.write(1, SEVEN)
    assert struct.unpack("<16Q", path.read_bytes()) == (0,) * 8 + (2, *SEVEN)
    page.close()


def test_a_reader_sees_what_was_written(path: Path) -> None:
    writer = Page.create(path, slots=3)
    reader = Page.open(path)
    assert reader.slots == 3
    assert reader.read(2) == (0,) * 7
    writer.write(2, (TOP, 0, 1, 2, 3, 4, TOP))
    assert reader.read(2) == (TOP, 0, 1, 2, 3, 4, TOP)
    assert reader.read(0) == (0,) * 7
    reader.close()
    writer.close()


def test_a_reader_cannot_write(path: Path) -> None:
    Page.create(path).close()
    reader = Page.open(path)
    with pytest.raises(TypeError):
        reader.write(0, SEVEN)
    reader.close()


def test_a_reopened_page_keeps_its_content_and_may_grow(path: Path) -> None:
    first = Page.create(path)
    first.write(0, SEVEN)
    first.close()
    again = Page.create(path, slots=4)
    assert again.read(0) == SEVEN
    assert again.read(3) == (0,) * 7
    assert path.stat().st_size == 4 * SLOT_BYTES
    again.close()


def test_a_page_is_for_the_group(path: Path) -> None:
    Page.create(path).close()
    assert path.stat().st_mode & 0o007 == 0


@pytest.mark.parametrize("slots", [0, -1, MAX_SLOTS + 1])
def test_a_page_has_1_to_64_slots(path: Path, slots: int) -> None:
    with pytest.raises(ValueError, match="1 to 64 slots"):
        Page.create(path, slots)


def test_a_page_that_is_not_there_or_not_whole_yet_is_a_page_error(path: Path) -> None:
    with pytest.raises(PageError, match="does not exist yet"):
        Page.open(path)
    path.write_bytes(bytes(SLOT_BYTES - 1))
    with pytest.raises(PageError, match="63 bytes, less than one slot"):
        Page.open(path)


def test_a_slot_whose_writer_died_inside_a_write_is_an_error_until_the_next_write(path: Path) -> None:
    writer, reader = Page.create(path), Page.open(path)
    writer.write(0, SEVEN)
    writer.words[0] += 1  # odd: as a kill in the middle of a write leaves it
    writer.words[3] = 99
    with pytest.raises(PageError, match="died or was stopped inside a write"):
        reader.read()
    writer.write(0, SEVEN)
    assert reader.read() == SEVEN
    writer.close()
    reader.close()


@pytest.mark.parametrize("bad", [-1, TOP + 1])
@pytest.mark.parametrize("word", range(7))
def test_a_value_that_does_not_fit_leaves_the_slot_as_it_was(path: Path, bad: int, word: int) -> None:
    page = Page.create(path)
    page.write(0, SEVEN)
    values = list(SEVEN)
    values[word] = bad
    with pytest.raises(OverflowError):
        page.write(0, tuple(values))  # type: ignore[arg-type]
    assert page.read() == SEVEN
    page.close()


@pytest.mark.parametrize("loss", [0.0, -1.5, math.inf, -math.inf, 1e-310])
@pytest.mark.parametrize("validating", [False, True])
def test_a_heartbeat_survives_its_words(loss: float, validating: bool) -> None:
    beat = Heartbeat(
        step=2**40,
        epoch=2**32 - 1,
        phase=10,
        beat_ns=2**62,
        loss=loss,
        total_steps=2**41,
        pid=4194304,
        emergency_order=TOP,
        validating=validating,
    )
    assert Heartbeat.of(beat.words()) == beat


def test_a_heartbeat_carries_a_loss_that_is_no_number() -> None:
    beat = Heartbeat(step=0, epoch=0, phase=0, beat_ns=0, loss=math.nan, total_steps=0, pid=0, emergency_order=0)
    assert math.isnan(Heartbeat.of(beat.words()).loss)


def record(**changes: object) -> EmergencyRecord:
    fields = {
        "term": 3,
        "seq": 7,
        "mode": 2,
        "clear": False,
        "attempt": 5,
        "signal_id": "0123456789abcdef" * 2,
        "arrived_ns": 123,
        "source": 4,
    }
    return EmergencyRecord(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{}, {"clear": True}, {"term": 2**32 - 1, "seq": 2**32 - 1, "attempt": 2**32 - 1}, {"signal_id": "f" * 32}],
)
def test_an_emergency_record_survives_its_words(changes: dict[str, object]) -> None:
    made = record(**changes)
    assert EmergencyRecord.of(made.words()) == made
    assert made.words()[EMERGENCY_ORDER_WORD - 1] == made.order  # word 0 is the page's own


def test_no_signal_yet_is_none() -> None:
    assert EmergencyRecord.of((0,) * 7) is None


@pytest.mark.parametrize("word", range(7))
def test_a_flipped_bit_in_an_emergency_record_is_seen(word: int) -> None:
    for bit in range(64):
        words = list(record().words())
        words[word] ^= 1 << bit
        with pytest.raises(PageError, match="checksum"):
            EmergencyRecord.of(tuple(words))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"term": 2**32}, "must fit 32 bits"),
        ({"seq": 2**32}, "must fit 32 bits"),
        ({"seq": -1}, "must fit 32 bits"),
        ({"signal_id": "ab"}, "must be 32 hex digits"),
        ({"signal_id": "zz" * 16}, "non-hexadecimal"),
    ],
)
def test_what_has_no_place_in_the_page_is_a_value_error(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        record(**changes).words()


def test_order_rises_with_term_then_seq() -> None:
    ordered = [(0, 1), (0, 2**32 - 1), (1, 0), (1, 1), (2, 0)]
    orders = [record(term=term, seq=seq).order for term, seq in ordered]
    assert orders == sorted(set(orders))


# Emergency signals


def emergency(seq: int, **changes: int) -> EmergencyRecord:
    fields = {"term": 1, "mode": 1, "clear": False, "attempt": 1, "arrived_ns": 5, "source": 1} | changes
    return EmergencyRecord(seq=seq, signal_id=f"{seq:032x}", **fields)  # type: ignore[arg-type]


def test_no_signal_replaces_an_unread_one(tmp_path: Path) -> None:
    writer = EmergencyPage.create(tmp_path / "page")
    reader = EmergencyPage.open(tmp_path / "page")
    assert (reader.newest(), reader.since(0)) == (None, [])
    for seq in range(1, EmergencyPage.RING + 1):
        writer.publish(emergency(seq))
    assert [record.seq for record in reader.since(0)] == list(range(1, EmergencyPage.RING + 1))
    assert [record.seq for record in reader.since(emergency(12).order)] == [13, 14, 15]
    newest = reader.newest()
    assert newest is not None
    assert reader.since(newest.order) == []


def test_of_more_signals_than_fit_the_newest_remain(tmp_path: Path) -> None:
    writer = EmergencyPage.create(tmp_path / "page")
    for seq in range(1, 41):
        writer.publish(emergency(seq))
    found = [record.seq for record in EmergencyPage.open(tmp_path / "page").since(0)]
    assert found == list(range(40 - EmergencyPage.RING + 1, 41))


def test_a_torn_slot_of_the_ring_hides_no_other(tmp_path: Path) -> None:
    writer = EmergencyPage.create(tmp_path / "page")
    for seq in (1, 2, 3):
        writer.publish(emergency(seq))
    writer.page.words[8 * 2 + 2] ^= 1
    assert [record.seq for record in EmergencyPage.open(tmp_path / "page").since(0)] == [1, 3]


def test_a_signal_of_a_new_term_comes_after_all_of_the_old_one(tmp_path: Path) -> None:
    writer = EmergencyPage.create(tmp_path / "page")
    writer.publish(emergency(9, term=1))
    writer.publish(emergency(1, term=2))
    assert [(record.term, record.seq) for record in writer.since(0)] == [(1, 9), (2, 1)]


def test_numbers_that_begin_again_in_a_new_term_replace_no_unread_signal(tmp_path: Path) -> None:
    writer = EmergencyPage.create(tmp_path / "page")
    sent = [emergency(seq, term=term) for term in (1, 2, 3) for seq in (4, 5, 6)]
    for record in sent:
        writer.publish(record)
    assert EmergencyPage.open(tmp_path / "page").since(0) == sent


@pytest.mark.parametrize(
    ("sent", "known"),
    [
        ([], []),
        (["a"], ["a"]),
        (["a", "b"], ["b"]),
        (["a", "-a"], ["-a"]),
        (["a", "b", "-a"], ["b", "-a"]),  # b is in force: lifting a lifts nothing else
        (["a", "b", "-b"], ["-b"]),  # b had taken the place of a
        (["a", "-a", "b"], ["b"]),
        (["other", "-a"], ["-a"]),
    ],
)
def test_who_comes_later_learns_what_is_in_force(tmp_path: Path, sent: list[str], known: list[str]) -> None:
    names = {"a": "aa" * 16, "b": "bb" * 16, "other": "cc" * 16}
    records = {
        word: EmergencyRecord(
            term=1, seq=seq, mode=1, clear=word[0] == "-", attempt=2 if word == "other" else 1,
            signal_id=names[word.lstrip("-")], arrived_ns=5, source=1,
        )
        for seq, word in enumerate(sent, start=1)
    }  # fmt: skip
    writer = EmergencyPage.create(tmp_path / "page")
    for record in records.values():
        writer.publish(record)
    assert EmergencyPage.open(tmp_path / "page").standing(1) == [records[word] for word in known]
