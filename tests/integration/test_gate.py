"""The speed gate: paired ratios against limits in a file, which a real slowdown breaks and an uneven machine does not.

The limits are what a machine shared with other tests can keep, not the goals; `make bench` judges those.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.bench import common
from tests.bench.bench_overhead import CODE, Esper, esper_side, measure, plain_side
from tests.bench.common import ROOT, quantile

LIMITS = json.loads((ROOT / "tests/bench/limits.json").read_text())
ROUNDS = 24
SECONDS = 12.0
pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def esper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(CODE))
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield esper_side(Path(directory), "64", "adamw", 1)
    torch.set_num_threads(threads)
    sys.modules.pop("benchload", None)


def paired(esper: Esper) -> float | None:
    """Median of esper / plain by the CPU time of the training thread; None when the machine is too uneven to judge."""
    taken, _ = measure({"plain": plain_side("64", "adamw"), "esper": esper.run}, ROUNDS, SECONDS)
    plain = taken["plain"].cpu
    if (quantile(plain, 0.75) - quantile(plain, 0.25)) / quantile(plain, 0.5) > 0.5 or len(plain) < 8:
        return None
    return quantile([one / other for one, other in zip(taken["esper"].cpu, plain, strict=True)], 0.5)


@pytest.mark.row("T44", "T47")
def test_protection_stays_below_its_limit_and_a_slowdown_is_noticed(esper: Esper):
    limit = LIMITS["esper / plain, 64, adamw"]["limit"]
    ratio = paired(esper)
    if ratio is None:
        pytest.skip("the machine is too uneven to judge")
    print(f"esper / plain {ratio:.3f}x, limit {limit}x")
    assert ratio <= limit
    step = esper.parts.step
    run = step.run

    def twice_as_slow(batch, state):
        began = time.thread_time()
        result = run(batch, state)
        took = time.thread_time() - began
        while time.thread_time() - began < 2 * took:
            pass
        return result

    step.run = twice_as_slow  # type: ignore[method-assign]
    slow = paired(esper)
    assert slow is None or slow > limit


@pytest.mark.row("T44")
def test_a_figure_is_judged_and_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(common, "_figures", [{}])  # else the end of this process would save
    monkeypatch.setenv("ESPER_BENCH_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench_thing.py"])
    common.section("small")
    assert "goal 1.5: met" in common.ratio("x", [3.0] * 40, [2.0] * 40, goal="P3", limit=1.5)
    assert "goal 1.4: MISSED" in common.ratio("x", [3.0] * 40, [2.0] * 40, goal="P3", limit=1.4)
    assert "too uneven" in common.ratio("x", [3.0] * 40, [1.0, 9.0] * 20, goal="P3", limit=1.4)
    assert "MISSED" in common.row("y", [1.0] * 90 + [9.0] * 10, goal="P2", limit=5.0)
    common._save()
    figures = json.loads((tmp_path / "thing.json").read_text())["figures"][1:]
    assert [figure["median"] for figure in figures[:2]] == [1.5, 1.5]
    assert figures[0] | {"section": "small", "goal": "P3", "limit": 1.5, "n": 40} == figures[0]
    assert capsys.readouterr().out == "small\n"
