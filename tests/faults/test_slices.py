"""A short slice of each campaign; the whole of them is `make faults`."""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.campaign import Book, Campaign, Found, Progress, fire, run, table
from tests.faults.clocks import Clocks
from tests.faults.corrupt import Corrupt
from tests.faults.drains import Drains
from tests.faults.kills import Kills
from tests.faults.nonfinite import NonFinite
from tests.faults.redis_kills import Redis
from tests.faults.volumes import Volumes

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("campaign", "shots", "least"),
    [
        pytest.param(Kills(), 3, 5, marks=pytest.mark.row("T17", "T18")),
        pytest.param(Corrupt(), 4, 200, marks=pytest.mark.row("T17")),
        pytest.param(NonFinite(), 12, 12, marks=pytest.mark.row("T11", "T19")),
        pytest.param(Drains(), 1, 1, marks=pytest.mark.row("T18")),
        pytest.param(Volumes(), 1, 1, marks=pytest.mark.row("T17")),
        pytest.param(Clocks(), 1, 5),
        pytest.param(Redis(faults_per_shot=4), 1, 4),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else None,
)
def test_a_slice_of_the_campaign_finds_nothing(campaign: Campaign, shots: int, least: int, tmp_path: Path) -> None:
    progress = Progress()
    for _ in range(shots):
        fire(campaign, progress, scratch=tmp_path)
    assert progress.faults >= least
    assert not os.listdir(tmp_path)


class Fragile:
    """Breaks at its third shot."""

    name = "fragile"
    goal = 10

    def shoot(self, number: int, directory: Path) -> "Counter[str]":
        (directory / "evidence").write_text("here")
        assert number != 2, "it broke"
        return Counter(faults=2, kind=1)


def test_progress_is_kept_and_a_finding_names_its_shot_and_keeps_its_files(tmp_path: Path) -> None:
    book = Book(tmp_path / "book.json")
    with pytest.raises(Found, match=r"fragile, shot 2: it broke") as found:
        run([Fragile()], book, budget_s=60, scratch=tmp_path)
    kept = Path(str(found.value).rpartition("kept in ")[2])
    assert (kept / "evidence").read_text() == "here"
    again = Book(tmp_path / "book.json")
    assert (again.of("fragile").next, again.of("fragile").faults) == (2, 4)
    assert "fragile" in table([Fragile()], again)


def test_a_campaign_stops_at_its_goal(tmp_path: Path) -> None:
    class Sturdy(Fragile):
        def shoot(self, number: int, directory: Path) -> "Counter[str]":
            return Counter(faults=4)

    book = Book(tmp_path / "book.json")
    run([Sturdy()], book, budget_s=60, scratch=tmp_path)
    assert (book.of("fragile").next, book.of("fragile").faults) == (3, 12)
