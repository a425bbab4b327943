"""Long campaigns of faults: numbered shots, each a pure function of its number, so that any of them can be repeated.

A campaign counts the faults that it really injected; what it finds is an AssertionError that names the shot. Progress
is kept on disk after every shot, so an interrupted campaign goes on where it was.
"""

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Campaign(Protocol):
    """One kind of fault."""

    name: str
    goal: int
    """Faults that are wanted in all."""

    def shoot(self, number: int, directory: Path) -> "Counter[str]":
        """Injects the faults of shot `number` in an empty directory. Counts by kind; the goal is about "faults"."""


@dataclass(kw_only=True)
class Progress:
    """What a campaign has done so far, over all its sessions."""

    next: int = 0
    counts: "Counter[str]" = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def faults(self) -> int:
        return self.counts["faults"]


class Book:
    """Progress of all campaigns in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        self.entries = {
            name: Progress(next=entry["next"], counts=Counter(entry["counts"]), seconds=entry["seconds"])
            for name, entry in found.items()
        }

    def of(self, name: str) -> Progress:
        return self.entries.setdefault(name, Progress())

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".new")
        document = {
            n: {"next": p.next, "counts": dict(p.counts), "seconds": p.seconds} for n, p in self.entries.items()
        }
        draft.write_text(json.dumps(document, indent=1))
        draft.replace(self._path)


class Found(AssertionError):
    """A fault that the product does not survive."""


def fire(campaign: Campaign, progress: Progress, *, scratch: Path | None = None) -> None:
    """One shot. Found names its number and the directory that is kept."""
    directory = Path(tempfile.mkdtemp(prefix=f"esper-{campaign.name}-", dir=scratch))
    began = time.monotonic()
    number = progress.next
    try:
        counts = campaign.shoot(number, directory)
    except AssertionError as error:
        raise Found(f"{campaign.name}, shot {number}: {error}\nkept in {directory}") from error
    shutil.rmtree(directory)
    progress.next += 1
    progress.counts += counts
    progress.seconds += time.monotonic() - began


def run(
    campaigns: Sequence[Campaign],
    book: Book,
    *,
    budget_s: float,
    scratch: Path | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> None:
    """Takes turns until every goal is reached or the time is used up; the one that is furthest behind goes first."""
    end = monotonic() + budget_s
    while monotonic() < end:
        open_ones = [campaign for campaign in campaigns if book.of(campaign.name).faults < campaign.goal]
        if not open_ones:
            return
        campaign = min(open_ones, key=lambda c: book.of(c.name).faults / c.goal)
        fire(campaign, book.of(campaign.name), scratch=scratch)
        book.save()


def table(campaigns: Sequence[Campaign], book: Book) -> str:
    """Faults injected, of how many wanted, by kind."""
    lines = [f"{'campaign':14} {'faults':>8} {'goal':>8} {'shots':>7} {'minutes':>8}  of which"]
    for campaign in campaigns:
        progress = book.of(campaign.name)
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(progress.counts.items()) if kind != "faults")
        done = f"{progress.faults:8} {campaign.goal:8} {progress.next:7} {progress.seconds / 60:8.1f}"
        lines.append(f"{campaign.name:14} {done}  {kinds}")
    return "\n".join(lines)
