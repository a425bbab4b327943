"""The sweep over sizes: what it leaves out, how many rounds it makes, and which slopes it tells."""

import sys
from pathlib import Path

import pytest

from tests.bench import common, sizes
from tests.bench.sizes import MIB, Point, fits, rounds_within, sizes_of, tell


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    kept: list[dict[str, object]] = [{}]  # not empty: else the end of this process would save
    monkeypatch.setattr(common, "_figures", kept)
    monkeypatch.setattr(sys, "argv", ["bench_thing.py"])
    return kept


def test_sizes_ascend_and_may_be_none():
    assert sizes_of("16,1,256") == [1, 16, 256]
    assert sizes_of("") == []


def test_a_size_without_room_is_left_out_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sizes, "_available", lambda: 2 * sizes.MARGIN)
    assert fits(sizes.MARGIN // MIB, memory=1.0, disk=(tmp_path, 0.0))
    assert not fits(sizes.MARGIN // MIB, memory=1.5, disk=(tmp_path, 0.0))
    assert "1024 MiB left out: needs 2.5 GiB of memory, 2.0 are free" in capsys.readouterr().out
    assert not fits(1, memory=0.0, disk=(tmp_path, 1e12))


def test_time_ends_the_rounds_but_not_below_the_fewest():
    assert list(rounds_within(0.0, most=40)) == [0, 1, 2]
    assert list(rounds_within(1e9, most=5)) == [0, 1, 2, 3, 4]


def test_slopes_stand_between_neighbouring_sizes(capsys: pytest.CaptureFixture[str], figures: list[dict[str, object]]):
    points = [Point(mib, [1.0 + 3 * mib] * 3, [2.0 * mib] * 3) for mib in (1, 4, 16)]
    tell("ours against the floor", points, goal="P3")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ours against the floor"
    assert [line.split()[:5] for line in lines[2:]] == [
        ["1", "3", "4.000", "2.000", "2.000x"],
        ["4", "3", "13.000", "8.000", "1.625x"],
        ["16", "3", "49.000", "32.000", "1.531x"],
    ]
    assert [line.split()[5:] for line in lines[3:]] == [["3.0000", "2.0000", "1.500x"]] * 2
    assert [figure["name"] for figure in figures[1:]] == ["slope 1 to 4 MiB", "slope 4 to 16 MiB"]


def test_a_slope_that_falls_is_not_told():
    assert "too uneven" in sizes._slope(Point(1, [5.0], [1.0]), Point(4, [4.0], [2.0]), "P5")
