"""The record's queue against a plain model, and its file against any cut."""

import tempfile
from pathlib import Path

from esper_leyline.events import Level, RunEvent, priority
from esper_runtime.tolaria.record import Author, Line, Queue, Sink, read
from hypothesis import given
from hypothesis import strategies as st

KINDS = st.tuples(st.sampled_from([RunEvent.PROGRESS, RunEvent.NOTICE, RunEvent.RUN_FAILED]), st.sampled_from(Level))


def lines(kinds: list[tuple[RunEvent, Level]]) -> list[Line]:
    return [
        Line(number=number, ns=number, time_ns=number, event=event, level=level, step=number, fields={"n": number})
        for number, (event, level) in enumerate(kinds, 1)
    ]


@given(st.lists(KINDS, max_size=60), st.integers(1, 8))
def test_a_full_queue_keeps_the_most_important_and_of_equals_the_newest(kinds: list[tuple[RunEvent, Level]], size: int):
    queue = Queue(size)
    kept: list[Line] = []
    for line in lines(kinds):
        dropped = queue.add(line)
        kept.append(line)
        if len(kept) > size:
            least = min(kept, key=lambda held: (priority(held.event, held.level), held.number))
            kept.remove(least)
            assert dropped == priority(least.event, least.level)
        else:
            assert dropped is None
        assert len(queue) == len(kept)
    assert queue.take() == kept


@given(st.lists(KINDS, min_size=1, max_size=20), st.data())
def test_a_file_cut_anywhere_gives_its_whole_lines_and_goes_on(
    kinds: list[tuple[RunEvent, Level]], data: st.DataObject
):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.jsonl"
        author = Author(attempt=1, incarnation=1, trainer_start=1)
        Sink(path, author).write(lines(kinds), {})
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        before = [line["step"] for line in read(path)]
        assert before == list(range(1, whole[:cut].count(b"\n") + 1))
        after = Line(number=99, ns=1, time_ns=1, event=RunEvent.EPOCH, level=Level.INFO, step=99, fields={})
        Sink(path, author).write([after], {})
        completed = [len(before) + 1] if whole[cut : cut + 1] == b"\n" else []  # nothing but its end was torn off
        assert [line["step"] for line in read(path)] == [*before, *completed, 99]
