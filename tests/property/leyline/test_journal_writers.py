"""Several processes write into one journal, some killed on the way, while this one reads."""

import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import hypothesis.strategies as st
from esper_leyline.journal import JournalReader, JournalWriter
from esper_leyline.v1 import report_pb2 as pb
from hypothesis import given, settings

EVENTS = 4000


WRITER = """
import sys
from pathlib import Path
from esper_leyline.journal import JournalWriter
from esper_leyline.v1 import report_pb2 as pb
path, name, events = sys.argv[1:]
writer = JournalWriter(Path(path))
for number in range(int(events)):
    message = "ESPJ" * (number % 700)
    writer.append(pb.RuntimeEvent(writer=name, monotonic_ns=number, failure=pb.Failure(message=message)))
"""


def started(path: Path, name: str, events: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(events)])


def test_interleaved_writers_lose_nothing_and_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    reader = JournalReader(path)
    writers = {name: started(path, name, EVENTS) for name in ("supervisor", "tolaria")}
    seen: dict[str, list[int]] = {name: [] for name in writers}
    deadline = time.monotonic() + 30
    while sum(map(len, seen.values())) < 2 * EVENTS:
        assert time.monotonic() < deadline, {name: len(found) for name, found in seen.items()}
        for event in reader.events():
            seen[event.writer].append(event.monotonic_ns)
        reader.release()
    for name, writer in writers.items():
        writer.wait()
        assert seen[name] == list(range(EVENTS))
    assert reader.skipped_bytes == 0
    assert path.stat().st_blocks * 512 < 1024 * 1024


def test_a_killed_writer_takes_nothing_of_the_others_with_it(tmp_path: Path) -> None:
    """Also not when it dies inside a write: what it has written so far is whole or skipped."""
    path = tmp_path / "journal"
    reader = JournalReader(path)
    seen: dict[str, list[int]] = {}

    def take(until: str, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(seen.get(until, ())) < count:
            assert time.monotonic() < deadline, f"{count} events of {until}"
            # A slice at a time: endless writers may be quicker than their reader.
            for event in islice(reader.events(), 100):
                seen.setdefault(event.writer, []).append(event.monotonic_ns)
            reader.release()

    for number in range(4):
        endless = started(path, f"trainer-{number}", 10**9)
        try:
            take(f"trainer-{number}", 50)
        finally:
            endless.kill()
            endless.wait()
    survivor = started(path, "supervisor", 100)
    take("supervisor", 100)
    survivor.wait()
    assert all(found == list(range(len(found))) for found in seen.values())


frames = st.builds(
    lambda number, message: pb.RuntimeEvent(monotonic_ns=number, failure=pb.Failure(message=message)),
    st.integers(1, 2**60),
    st.one_of(st.text(max_size=30), st.just("ESPJ" * 9)),
)
pieces = st.lists(st.one_of(frames, st.binary(max_size=40), st.just(b"ESPJ"), st.just(b"ESPJ\x08\x00\x00\x00")))


@settings(max_examples=300, deadline=None)
@given(content=pieces, steps=st.lists(st.integers(1, 60), max_size=30))
def test_every_whole_frame_comes_out_once_however_the_file_grows(
    content: list[pb.RuntimeEvent | bytes], steps: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal"
        raw = bytes_of(content, path)
        expected = [piece.monotonic_ns for piece in content if isinstance(piece, pb.RuntimeEvent)]
        reader, found, at = JournalReader(path), [], 0
        with path.open("wb", buffering=0) as file:
            for step in [*steps, len(raw)]:
                file.write(raw[at : at + step])
                at += step
                found += [event.monotonic_ns for event in reader.events()]
        reader.close()
    # Garbage may announce a frame that never comes; it is given up once a whole frame is behind it, so every frame
    # comes out, in order and once, whatever lies between.
    assert found == expected


def bytes_of(content: list[pb.RuntimeEvent | bytes], path: Path) -> bytes:
    for piece in content:
        if isinstance(piece, bytes):
            with path.open("ab") as file:
                file.write(piece)
        else:
            writer = JournalWriter(path)
            writer.append(piece)
            writer.close()
    raw = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    return raw
