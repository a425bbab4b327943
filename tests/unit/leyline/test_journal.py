"""The journal: frames torn anywhere, bits flipped, garbage in between, memory given back, a full volume."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from esper_leyline import journal
from esper_leyline.journal import MAGIC, MAX_PAYLOAD, JournalError, JournalReader, JournalWriter
from esper_leyline.v1 import report_pb2 as pb


def event(number: int, message: str = "") -> pb.RuntimeEvent:
    return pb.RuntimeEvent(writer="tolaria", monotonic_ns=number, failure=pb.Failure(step=number, message=message))


def frame(made: pb.RuntimeEvent, path: Path) -> bytes:
    """The bytes of one frame."""
    JournalWriter(path).append(made)
    content = path.read_bytes()
    path.unlink()
    return content


def numbers(reader: JournalReader) -> list[int]:
    return [found.monotonic_ns for found in reader.events()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def three(path: Path) -> list[bytes]:
    return [frame(event(number, "x" * number), path) for number in (1, 2, 3)]


def test_events_come_out_as_they_went_in(path: Path) -> None:
    writer, reader = JournalWriter(path), JournalReader(path)
    sent = [event(number) for number in range(5)]
    assert all(writer.append(one) for one in sent)
    assert list(reader.events()) == sent
    assert list(reader.events()) == []
    assert reader.offset == path.stat().st_size
    writer.append(event(9))
    assert numbers(reader) == [9]
    assert reader.skipped_bytes == 0
    assert path.stat().st_mode & 0o007 == 0


def test_a_reader_goes_on_where_another_stopped(path: Path) -> None:
    writer, first = JournalWriter(path), JournalReader(path)
    for number in range(4):
        writer.append(event(number))
    events = first.events()
    assert [next(events).monotonic_ns for _ in range(2)] == [0, 1]
    assert numbers(JournalReader(path, first.offset)) == [2, 3]


def test_a_journal_that_is_not_there_yet_has_no_events(path: Path) -> None:
    reader = JournalReader(path)
    assert numbers(reader) == []
    JournalWriter(path).append(event(1))
    assert numbers(reader) == [1]
    reader.close()


def test_a_frame_torn_at_any_byte_costs_itself_only(path: Path, three: list[bytes]) -> None:
    first, second, third = three
    for cut in range(len(second)):
        path.write_bytes(first + second[:cut] + third)
        reader = JournalReader(path)
        assert numbers(reader) == [1, 3], cut
        assert reader.skipped_bytes == cut
        reader.close()


def test_a_frame_that_ends_the_file_is_waited_for_at_any_byte(path: Path, three: list[bytes]) -> None:
    first, second, third = three
    for cut in range(len(second)):
        path.write_bytes(first + second[:cut])
        reader = JournalReader(path)
        assert numbers(reader) == [1], cut
        assert numbers(reader) == []
        with path.open("ab") as file:
            file.write(second[cut:] + third)
        assert numbers(reader) == [2, 3], cut
        assert reader.skipped_bytes == 0
        reader.close()


def test_a_message_that_holds_the_magic_is_waited_for_too(path: Path) -> None:
    whole = frame(event(1, "ESPJ" * 40), path)
    for cut in range(0, len(whole), 3):
        path.write_bytes(whole[:cut])
        reader = JournalReader(path)
        assert numbers(reader) == []
        path.write_bytes(whole)
        assert numbers(reader) == [1], cut
        reader.close()


def test_any_flipped_bit_costs_one_frame_at_most(path: Path, three: list[bytes]) -> None:
    first, second, third = three
    for bit in range(8 * len(second)):
        damaged = bytearray(second)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(first + bytes(damaged) + third)
        reader = JournalReader(path)
        assert numbers(reader) == [1, 3], bit
        reader.close()


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\x00" * 5000, id="zeros"),
        pytest.param(MAGIC, id="a magic"),
        pytest.param(MAGIC * 50, id="magics"),
        pytest.param(MAGIC[:3], id="most of a magic"),
        pytest.param(MAGIC + b"\xff" * 8, id="a giant length"),
        pytest.param(MAGIC + (100).to_bytes(4, "little") + bytes(4), id="a header alone"),
        pytest.param(random.Random(1).randbytes(3 * MAX_PAYLOAD), id="more than any frame"),
        pytest.param(bytes(5 * MAX_PAYLOAD) + MAGIC[:2], id="many chunks of zeros"),
    ],
)
def test_garbage_between_frames_is_skipped_and_counted(path: Path, three: list[bytes], garbage: bytes) -> None:
    first, second, third = three
    path.write_bytes(first + garbage + second + garbage)
    reader = JournalReader(path)
    assert numbers(reader) == [1, 2]
    assert reader.skipped_bytes >= len(garbage)
    with path.open("ab") as file:
        file.write(third)
    assert numbers(reader) == [3]
    assert reader.skipped_bytes == 2 * len(garbage)


def test_hopeless_bytes_are_not_read_again_and_again(path: Path, three: list[bytes]) -> None:
    path.write_bytes(random.Random(2).randbytes(1_000_000))
    reader = JournalReader(path)
    assert numbers(reader) == []
    assert reader.offset > 1_000_000 - 2 * MAX_PAYLOAD
    assert reader.skipped_bytes == reader.offset


def test_a_right_checksum_over_foreign_bytes_is_skipped(path: Path, three: list[bytes]) -> None:
    payload = b"\xff\xff\xff"
    foreign = journal._HEADER.pack(MAGIC, len(payload), journal.crc32c.crc32c(payload)) + payload
    path.write_bytes(three[0] + foreign + three[1])
    assert numbers(JournalReader(path)) == [1, 2]


def test_a_frame_completed_while_its_successor_is_found_is_not_lost(
    path: Path, three: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look sees half of frame 2; before the second look it is whole and frame 3 is behind it."""
    first, second, third = three
    path.write_bytes(first + second[:20])
    reader = JournalReader(path)
    events = reader.events()
    assert next(events).monotonic_ns == 1
    look = journal._candidate

    def grows(descriptor: int, start: int) -> int:
        path.write_bytes(first + second + third)
        return look(descriptor, start)

    monkeypatch.setattr(journal, "_candidate", grows)
    assert [one.monotonic_ns for one in events] == [2, 3]
    assert reader.skipped_bytes == 0


# --- memory --------------------------------------------------------------------------------------------------


def test_released_memory_goes_back_and_offsets_stay(path: Path) -> None:
    writer, reader = JournalWriter(path), JournalReader(path)
    for number in range(100):
        writer.append(event(number, "x" * 4000))
    before = path.stat()
    assert len(numbers(reader)) == 100
    reader.release()
    after = path.stat()
    assert after.st_size == before.st_size
    assert after.st_blocks * 512 <= 8192
    writer.append(event(100))
    assert numbers(reader) == [100]


def test_a_reader_that_lost_its_place_finds_what_is_left(path: Path) -> None:
    """The released part reads as megabytes of zeros, which are no damage."""
    writer, reader = JournalWriter(path), JournalReader(path)
    for number in range(400):
        writer.append(event(number, "x" * 4000))
    numbers(reader)
    reader.release()
    writer.append(event(400))
    fresh = JournalReader(path)
    assert numbers(fresh) == [400]
    assert fresh.skipped_bytes < 4096


def test_releasing_nothing_is_fine(path: Path) -> None:
    JournalReader(path).release()
    JournalWriter(path).append(event(1))
    reader = JournalReader(path)
    assert numbers(reader) == [1]
    reader.release()
    assert numbers(JournalReader(path)) == [1]


KINDS: dict[str, Callable[[], pb.RuntimeEvent]] = {
    "boot": lambda: pb.RuntimeEvent(boot=pb.Boot(attempt=1)),
    "transition": lambda: pb.RuntimeEvent(transition=pb.Transition(step=1)),
    "recovery": lambda: pb.RuntimeEvent(recovery=pb.Recovery(from_step=1)),
    "checkpoint": lambda: pb.RuntimeEvent(checkpoint=pb.CheckpointState(count=1)),
    "epoch": lambda: pb.RuntimeEvent(epoch=pb.Progress(step=1)),
    "ack": lambda: pb.RuntimeEvent(ack={"step": 1}),
    "failure": lambda: pb.RuntimeEvent(failure=pb.Failure(step=1)),
    "degradation": lambda: pb.RuntimeEvent(degradation=pb.Degradation(component="x")),
    "completion": lambda: pb.RuntimeEvent(completion=pb.Completion(export_path="x")),
    "notice": lambda: pb.RuntimeEvent(notice=pb.Notice(reason="x")),
}


def test_a_full_journal_drops_only_what_the_next_one_repeats(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(KINDS) == {field.name for field in pb.RuntimeEvent.DESCRIPTOR.oneofs_by_name["event"].fields}
    monkeypatch.setattr(journal, "MAX_RESIDENT_BYTES", 32 * 1024)
    writer, reader = JournalWriter(path), JournalReader(path)
    while path.stat().st_blocks * 512 <= 32 * 1024:
        writer.append(event(0, "x" * 4000))
    refused = {name for name, make in KINDS.items() if not writer.append(make())}
    assert refused == {"epoch", "checkpoint", "notice"}
    assert writer.dropped == 3
    assert {one.WhichOneof("event") for one in reader.events()} == set(KINDS) - refused
    reader.release()
    assert writer.append(KINDS["epoch"]())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_volume_never_stops_the_writer(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(number, os.strerror(number))

    writer = JournalWriter(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        assert writer.append(event(1)) is False
    assert writer.append(event(2)) is True
    assert writer.dropped == 1
    assert numbers(JournalReader(path)) == [2]


def test_a_write_cut_short_by_a_full_volume_is_a_torn_frame(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    writer = JournalWriter(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:17]))
        assert writer.append(event(1)) is False
    assert writer.append(event(2)) is True
    assert numbers(JournalReader(path)) == [2]


def test_any_other_error_of_the_volume_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, content: bytes) -> int:
        raise OSError(errno.EIO, "broken")

    writer = JournalWriter(path)
    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(OSError, match="broken"):
        writer.append(event(1))


def test_an_event_beyond_the_limit_is_refused(path: Path) -> None:
    writer = JournalWriter(path)
    with pytest.raises(JournalError, match="at most 65536"):
        writer.append(event(1, "x" * MAX_PAYLOAD))
    writer.append(event(2, "x" * (MAX_PAYLOAD - 100)))
    assert numbers(JournalReader(path)) == [2]
    writer.close()
