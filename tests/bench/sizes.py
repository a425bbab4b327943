"""A sweep over sizes of state: which of them this machine can hold, how many rounds each gets, the table of slopes."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from tests.bench.common import ratio, section

MIB: Final = 1 << 20
SIZES: Final = "1,4,16,64,256,1024,2048"
LEAST_ROUNDS: Final = 3
MARGIN: Final = 1 << 30
"""Of memory and disk, left to everything else."""


def sizes_of(text: str) -> list[int]:
    """MiB, ascending."""
    return sorted(int(word) for word in text.split(",") if word)


def fits(mib: int, *, memory: float, **places: tuple[Path, float]) -> bool:
    """Whether there is room for so many times the size; says so when not. `places`: (directory, times the size)."""
    offers = {"memory": (_available(), memory)}
    offers |= {name: (shutil.disk_usage(path).free, times) for name, (path, times) in places.items()}
    for name, (free, times) in offers.items():
        needed = mib * MIB * times + MARGIN
        if needed > free:
            print(f"  {mib} MiB left out: needs {needed / 2**30:.1f} GiB of {name}, {free / 2**30:.1f} are free")
            return False
    return True


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def rounds_within(seconds: float, *, most: int) -> Iterator[int]:
    """Numbers of rounds until the time is over; LEAST_ROUNDS at least."""
    end = time.monotonic() + seconds
    for number in range(most):
        if number >= LEAST_ROUNDS and time.monotonic() > end:
            return
        yield number


@dataclass(frozen=True, slots=True)
class Point:
    """Milliseconds at one size, ours and the floor's, round by round."""

    mib: float
    ours: list[float]
    floor: list[float]


def tell(title: str, points: list[Point], *, goal: str) -> None:
    """Cost against floor at each size, and what every further MiB costs, by neighbouring sizes."""
    if not points:
        return
    section(title)
    heads = ("MiB", "n", "ours ms", "floor ms", "ratio", "ours ms/MiB", "floor ms/MiB", "slopes' ratio")
    print("  " + "  ".join(f"{head:>{max(9, len(head))}}" for head in heads))
    before: Point | None = None
    for point in points:
        ours, floor = median(point.ours), median(point.floor)
        paired = median(one / other for one, other in zip(point.ours, point.floor, strict=True))
        line = f"  {point.mib:9.4g}  {len(point.ours):9}  {ours:9.3f}  {floor:9.3f}  {paired:8.3f}x"
        print(line + ("" if before is None else _slope(before, point, goal)))
        before = point


def _slope(before: Point, point: Point, goal: str) -> str:
    step = point.mib - before.mib
    ours, floor = (
        (median(after) - median(earlier)) / step
        for earlier, after in ((before.ours, point.ours), (before.floor, point.floor))
    )
    told = f"  {ours:11.4f}  {floor:12.4f}"
    if ours <= 0 or floor <= 0:
        return f"{told}  {'too uneven':>13}"
    ratio(f"slope {before.mib:.4g} to {point.mib:.4g} MiB", [ours], [floor], goal=goal)  # kept; the table tells it here
    return f"{told}  {ours / floor:12.3f}x"
