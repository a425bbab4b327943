"""What the benches share: the line about the machine, and robust numbers. Figures are printed, never judged."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


def row(name: str, values: Sequence[float], *, unit: str = "ms") -> str:
    """n, median, p95 and interquartile range of one series."""
    spread = quantile(values, 0.75) - quantile(values, 0.25)
    return (
        f"  {name:30} n={len(values):4}  median {statistics.median(values):9.3f}  p95 {quantile(values, 0.95):9.3f}  "
        f"IQR {spread:8.3f} {unit}"
    )


def ratio(name: str, values: Sequence[float], floor: Sequence[float]) -> str:
    """Median of the paired ratios, each of two measurements taken one after the other."""
    pairs = [value / base for value, base in zip(values, floor, strict=True)]
    low, high = quantile(pairs, 0.25), quantile(pairs, 0.75)
    noise = (quantile(floor, 0.75) - quantile(floor, 0.25)) / statistics.median(floor)
    doubt = "  (the machine was too uneven to judge)" if noise > 0.5 else ""
    return f"  {name:30} {statistics.median(pairs):.3f}x  (IQR {low:.3f} to {high:.3f}){doubt}"
