"""The emergency page under any order of signals, looks and deaths of its writer: no mix, no invention, no loss."""

import contextlib
import itertools
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from esper_leyline.pages import WORDS, EmergencyPage, EmergencyRecord, Page, PageError
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.waiting import PATIENT_S

RING = EmergencyPage.RING
STORES = 2 * (WORDS + 1)
"""Of one publication: two slots, each with its sequence twice and seven words."""


def signal(term: int, seq: int, *, clear: bool = False, attempt: int = 1, mode: int = 1) -> EmergencyRecord:
    name = f"{(term << 32 | seq) * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"
    return EmergencyRecord(
        term=term, seq=seq, mode=mode, clear=clear, attempt=attempt, signal_id=name, arrived_ns=seq, source=1
    )


class Killed(Exception):
    """The writer, between two stores."""


class MortalPage(Page):
    """Dies after so many stores of 8 bytes. Those in the middle of a slot come in any order, as memcpy may have it."""

    left = -1
    middle: tuple[int, ...] = tuple(range(WORDS - 1))

    def store(self, slot: int, packed: bytes) -> None:
        base, words = slot * WORDS, struct.unpack(f"={WORDS - 1}Q", packed)
        sequence = self.words[base] | 1
        stores = [(base, sequence), *((base + 1 + at, words[at]) for at in self.middle), (base, sequence + 1)]
        for place, value in stores:
            if self.left == 0:
                raise Killed
            self.left -= 1
            self.words[place] = value


def writer_of(path: Path) -> EmergencyPage:
    return EmergencyPage(MortalPage.create(path, slots=1 + RING))


def mortal(page: EmergencyPage, left: int, middle: tuple[int, ...] = MortalPage.middle) -> None:
    assert isinstance(page.page, MortalPage)
    page.page.left, page.page.middle = left, middle


class EmergencyMachine(RuleBasedStateMachine):
    """Three readers, each with its own pace, and a writer that is started anew after each death."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "page"
        self.writer = writer_of(self.path)
        self.readers = [EmergencyPage.open(self.path) for _ in range(3)]
        self.taken: list[list[EmergencyRecord]] = [[] for _ in self.readers]
        self.sent: list[EmergencyRecord] = []
        """In order; of the last one the writer may have died."""
        self.dying: EmergencyRecord | None = None

    def teardown(self) -> None:
        for page in (self.writer, *self.readers):
            page.close()
        shutil.rmtree(self.directory)

    @initialize(readers=st.integers(0, 3))
    def some_readers_look_first(self, readers: int) -> None:
        for reader in range(readers):
            self.look(reader)

    def _next(self, new_term: bool, seq: int, clear: bool) -> EmergencyRecord:
        last = self.sent[-1] if self.sent else signal(0, 0)
        term, seq = (last.term + 1, seq) if new_term else (last.term, last.seq + 1)
        made = signal(term, seq, clear=clear)
        self.sent.append(made)
        return made

    @property
    def room(self) -> bool:
        """The slowest reader has not yet read fewer than the ring holds."""
        return len(self.sent) - min(map(len, self.taken)) < RING

    @precondition(lambda self: self.room and self.dying is None)
    @rule(new_term=st.booleans(), seq=st.integers(1, 40), clear=st.booleans())
    def publish(self, new_term: bool, seq: int, clear: bool) -> None:
        self.writer.publish(self._next(new_term, seq, clear))

    @precondition(lambda self: self.room and self.dying is None)
    @rule(
        new_term=st.booleans(),
        seq=st.integers(1, 40),
        after=st.integers(0, STORES - 1),
        middle=st.permutations(range(WORDS - 1)),
    )
    def die_while_publishing(self, new_term: bool, seq: int, after: int, middle: list[int]) -> None:
        self.dying = self._next(new_term, seq, clear=False)
        mortal(self.writer, after, tuple(middle))
        with pytest.raises(Killed):
            self.writer.publish(self.dying)

    @precondition(lambda self: self.dying is not None)
    @rule(again=st.integers(0, STORES), middle=st.permutations(range(WORDS - 1)))
    def come_back(self, again: int, middle: list[int]) -> None:
        """The next writer puts in order what it finds, perhaps dies of that too, and hears the signal once more."""
        self.writer.close()
        self.writer = writer_of(self.path)
        mortal(self.writer, again, tuple(middle))
        try:
            found = self.writer.recover()
        except Killed:
            return
        mortal(self.writer, -1)
        assert found in (self.dying, self.sent[-2] if len(self.sent) > 1 else None)
        if found != self.dying:
            assert self.dying is not None
            self.writer.publish(self.dying)
        self.dying = None

    @rule(reader=st.integers(0, 2))
    def look(self, reader: int) -> None:
        taken = self.taken[reader]
        order = taken[-1].order if taken else 0
        try:
            found = self.readers[reader].since(order)
        except PageError:
            assert self.dying is not None  # torn, until the writer is back
            return
        taken += found

    @invariant()
    def what_was_taken_is_what_was_sent_in_order_without_a_gap(self) -> None:
        for taken in self.taken:
            assert taken == self.sent[: len(taken)]

    @precondition(lambda self: self.dying is None)
    @invariant()
    def everything_is_there_for_who_looks(self) -> None:
        for reader, taken in zip(self.readers, self.taken, strict=True):
            assert reader.since(taken[-1].order if taken else 0) == self.sent[len(taken) :]


EmergencyMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestEmergencyPage = EmergencyMachine.TestCase


@pytest.mark.parametrize("after", range(STORES + 1))
def test_a_writer_killed_at_any_store_loses_nothing_and_mixes_nothing(tmp_path: Path, after: int) -> None:
    """Every store, with the ring empty, half full and full, and the words of a slot from either end."""
    for before, middle in itertools.product(
        (0, RING // 2, RING, 2 * RING), ((0, 1, 2, 3, 4, 5, 6), (6, 5, 4, 3, 2, 1, 0))
    ):
        path = tmp_path / f"{before}-{middle[0]}"
        writer, reader = writer_of(path), EmergencyPage.open(path)
        sent = [signal(1, seq) for seq in range(1, before + 2)]
        for record in sent[:-1]:
            writer.publish(record)
        order = sent[-2].order if before else 0
        mortal(writer, after, middle)
        with contextlib.suppress(Killed):
            writer.publish(sent[-1])
        with contextlib.suppress(PageError):
            assert reader.since(order) in ([], sent[-1:])
        writer.close()
        writer = writer_of(path)
        assert writer.recover() in (sent[-1], sent[-2] if before else None)
        writer.publish(sent[-1])  # it comes again, by either way
        assert reader.since(order) == sent[-1:]
        assert reader.since(0) == sent[-RING:]
        for page in (writer, reader):
            page.close()


WRITER = """
import sys
from pathlib import Path
from esper_leyline.pages import EmergencyPage, Page
from tests.property.leyline.test_emergency_page import RING, signal
page, heard = EmergencyPage.create(Path(sys.argv[1])), Page.open(Path(sys.argv[2]))
last = page.recover()
seq = last.seq if last else 0
while True:
    if seq - heard.words[1] < RING:
        seq += 1
        page.publish(signal(1 + seq // 100, seq))
"""
SIGNALS = 3_000


@contextlib.contextmanager
def writing(*paths: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, *map(str, paths)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_real_writer_killed_again_and_again_loses_no_signal(tmp_path: Path) -> None:
    """The reader tells how far it is, and the writer keeps at most a ring of signals ahead of it. A signal in whose
    midst the writer was killed is numbered again by the next one, since nobody gave it to that one."""
    paths = tmp_path / "page", tmp_path / "heard"
    EmergencyPage.create(paths[0]).close()
    heard, reader = Page.create(paths[1]), EmergencyPage.open(paths[0])
    seq = order = deaths = 0
    deadline = time.monotonic() + PATIENT_S
    while seq < SIGNALS:
        until = seq + SIGNALS // 6
        with writing(*paths) as process:
            while seq < until:
                assert time.monotonic() < deadline, f"{seq} signals"
                assert process.poll() is None
                try:
                    found = reader.since(order)
                except PageError:
                    continue
                for record in found:
                    seq += 1
                    assert record == signal(1 + seq // 100, seq)
                    order = record.order
                heard.words[1] = seq
        deaths += 1
    assert deaths == 6
