"""A real writer process hammers a page while this process reads: no read is ever of two moments."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from esper_leyline.pages import Page, PageError

READS = 100_000
MOMENTS = 1000
MULTIPLIERS = (1, 3, 5, 7, 11, 13, 17)
MASK = 2**64 - 1

# Large values and unlike each other, so that a torn word or a mix of two writes cannot pass by chance.
HAMMER = f"""
import sys
from pathlib import Path
from esper_leyline.pages import Page
page = Page.create(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    page.write(0, tuple(number * 0x9E3779B97F4A7C15 * m & {MASK} for m in {MULTIPLIERS}))
"""


@contextlib.contextmanager
def hammered(path: Path) -> Iterator[Page]:
    """A reader whose writer is at work; it is killed at the end."""
    Page.create(path).close()
    reader = Page.open(path)
    before = reader.words[0]
    writer = subprocess.Popen([sys.executable, "-c", HAMMER, str(path)])
    try:
        deadline = time.monotonic() + 20
        while reader.words[0] == before:
            assert time.monotonic() < deadline, "the writer never wrote"
        yield reader
    finally:
        writer.kill()
        writer.wait()


def whole(values: tuple[int, ...]) -> bool:
    return values == tuple(values[0] * multiplier & MASK for multiplier in MULTIPLIERS)


def test_a_hundred_thousand_reads_are_each_of_one_moment(tmp_path: Path) -> None:
    torn, busy, reads, moments = 0, 0, 0, set()
    deadline = time.monotonic() + 30
    with hammered(tmp_path / "page") as reader:
        # On a busy machine the two may rarely run at the same time; reads beside an idle writer would prove nothing.
        while reads < READS or len(moments) < MOMENTS:
            assert time.monotonic() < deadline, f"{reads} reads, {len(moments)} moments"
            try:
                values = reader.read()
            except PageError:
                busy += 1  # no rest between writes that follow each other without a pause: an error, never a mix
                continue
            reads += 1
            torn += not whole(values)
            moments.add(values[0])
    assert torn == 0
    assert busy < reads / 20


def test_a_writer_killed_anywhere_leaves_one_moment_or_an_error(tmp_path: Path) -> None:
    for _ in range(10):
        with hammered(tmp_path / "page") as reader:
            pass
        with contextlib.suppress(PageError):
            assert whole(reader.read())
        reader.close()
