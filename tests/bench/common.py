"""What the benches share: the line about the machine, robust numbers, and a record of them as JSON.

Figures are printed, and judged against a goal only where one is given. With ESPER_BENCH_DIR set, every series and
ratio also goes into <dir>/<bench>.json, which `python -m tests.bench.summary` turns into one table.
"""

import atexit
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_figures: list[dict[str, object]] = []
_section = ""


def machine() -> str:
    """Processor, cores this process may use, load, Python and commit, in one line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    ).stdout.strip()
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, load {load}, Python {platform.python_version()}, "
        f"commit {commit or 'unknown'}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def timed(call: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def section(title: str) -> None:
    """Prints a heading; what follows is recorded under it."""
    global _section
    _section = title
    print(title)


def row(name: str, values: Sequence[float], *, unit: str = "ms", goal: str = "", limit: float | None = None) -> str:
    """n, median, p95 and interquartile range of one series. `goal` names a figure of the goals, whose p99 or, of fewer
    than 100 values, p95 is to be at most `limit`."""
    spread = quantile(values, 0.75) - quantile(values, 0.25)
    judged = quantile(values, 0.99 if len(values) >= 100 else 0.95)
    _note(name, values, unit=unit, goal=goal, limit=limit, judged=judged)
    return (
        f"  {name:30} n={len(values):4}  median {statistics.median(values):9.3f}  p95 {quantile(values, 0.95):9.3f}  "
        f"IQR {spread:8.3f} {unit}{_verdict(judged, limit)}"
    )


DRAWS = 1000
TAIL: dict[str, float] = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


def tail(name: str, values: Sequence[float], *, unit: str = "ms", goal: str = "", limit: float | None = None) -> str:
    """n, interquartile range and percentiles up to the greatest of one series, whose p99 is to be at most `limit`."""
    judged = quantile(values, 0.99)
    _note(name, values, unit=unit, goal=goal, limit=limit, judged=judged)
    spread = quantile(values, 0.75) - quantile(values, 0.25)
    shares = "  ".join(f"{word} {quantile(values, share):7.3f}" for word, share in TAIL.items())
    return f"  {name:30} n={len(values):5}  {shares}  IQR {spread:6.3f} {unit}{_verdict(judged, limit)}"


def ratio(
    name: str, values: Sequence[float], floor: Sequence[float], *, goal: str = "", limit: float | None = None
) -> str:
    """Median of the paired ratios, each of two measurements taken one after the other; to be at most `limit`."""
    pairs = [value / base for value, base in zip(values, floor, strict=True)]
    low, high = quantile(pairs, 0.25), quantile(pairs, 0.75)
    noise = (quantile(floor, 0.75) - quantile(floor, 0.25)) / statistics.median(floor)
    uneven = noise > 0.5
    doubt = "  (the machine was too uneven to judge)" if uneven else ""
    median = statistics.median(pairs)
    _note(name, pairs, unit="x", goal=goal, limit=None if uneven else limit, judged=median)
    return f"  {name:30} {median:.3f}x  (IQR {low:.3f} to {high:.3f}){doubt or _verdict(median, limit)}"


def difference(
    name: str,
    values: Sequence[float],
    floor: Sequence[float],
    *,
    unit: str,
    goal: str = "",
    limit: float | None = None,
) -> str:
    """Mean of the paired differences with the interval that holds it with 95 % (bootstrapped, the same draws each
    time). A `limit` is missed when even the interval's lower end is above it: less is not told from chance."""
    pairs = [value - base for value, base in zip(values, floor, strict=True)]
    dice = random.Random(len(pairs))
    means = [statistics.fmean(dice.choices(pairs, k=len(pairs))) for _ in range(DRAWS)]
    low, high = quantile(means, 0.025), quantile(means, 0.975)
    _note(name, pairs, unit=unit, goal=goal, limit=limit, judged=low)
    mean = statistics.fmean(pairs)
    return f"  {name:30} n={len(pairs):5}  {mean:+.3f} {unit} (95 % {low:+.3f} to {high:+.3f}){_verdict(low, limit)}"


def _verdict(judged: float, limit: float | None) -> str:
    if limit is None:
        return ""
    return f"  goal {limit:g}: {'met' if judged <= limit else 'MISSED'}"


def _note(name: str, values: Sequence[float], *, unit: str, goal: str, limit: float | None, judged: float) -> None:
    if not _figures:
        atexit.register(_save)
    _figures.append(
        {
            "section": _section,
            "name": name,
            "unit": unit,
            "n": len(values),
            "median": statistics.median(values),
            "p90": quantile(values, 0.90),
            "p95": quantile(values, 0.95),
            "p99": quantile(values, 0.99),
            "p99.9": quantile(values, 0.999),
            "max": max(values),
            "q1": quantile(values, 0.25),
            "q3": quantile(values, 0.75),
            "goal": goal,
            "limit": limit,
            "judged": judged,
        }
    )


def _save() -> None:
    directory = os.environ.get("ESPER_BENCH_DIR")
    if directory:
        bench = Path(sys.argv[0]).stem.removeprefix("bench_")
        Path(directory).mkdir(parents=True, exist_ok=True)
        document = {"bench": bench, "machine": machine(), "figures": _figures}
        (Path(directory) / f"{bench}.json").write_text(json.dumps(document, indent=1) + "\n")
