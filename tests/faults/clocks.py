"""Jumps of the wall clock by an hour and a day, forwards and back, while a real trainer runs (fault row 10).

A loss turns NaN meanwhile, and saves come and go by age and number: no order, no timeout and no rollback may change,
and the end must have the bits of a run whose clock stood right.
"""

import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from esper_leyline.exitcodes import ExitCode
from esper_runtime.checkpoint import LoadedGeneration

from tests.faults.spawned import configured, spawned, undisturbed
from tests.support.trainers import same_bits

SOURCE = Path(__file__).with_name("clock.c")
JUMPS_S = (3600, -3600, 86400, -86400, 1, -1)
HOLD_S = (0.005, 0.05)
SECTIONS = {
    "faultInjection": [{"kind": "NonFiniteLoss", "step": 700}, {"kind": "NonFiniteGradient", "step": 1500}],
    "rollback": {"maxRollbacks": 2, "windowSeconds": 86400},
}


class Clocks:
    name = "clocks"
    goal = 1_000

    def __init__(self) -> None:
        self._expected: LoadedGeneration | None = None

    def shoot(self, number: int, directory: Path) -> "Counter[str]":
        dice = random.Random(number)
        if self._expected is None:
            self._expected = undisturbed(directory / "undisturbed", **SECTIONS)
        pod = configured(directory / "jumping", **SECTIONS)
        offset = directory / "offset"
        environment = {"LD_PRELOAD": str(build(directory)), "CLOCK_OFFSET": str(offset)}
        counts: Counter[str] = Counter()
        with spawned(pod, environment) as process:
            while process.poll() is None:
                jump = dice.choice(JUMPS_S)
                draft = offset.with_suffix(".new")
                draft.write_text(str(jump))
                draft.replace(offset)
                if pod.heartbeat() is not None and pod.heartbeat().step:  # type: ignore[union-attr]
                    counts["faults"] += 1
                    counts[f"{jump:+} s"] += 1
                time.sleep(dice.uniform(*HOLD_S))
            said = process.communicate()[1]
        assert process.returncode == ExitCode.COMPLETE, f"ended with {process.returncode}: {said[-1500:]}"
        assert pod.counters().rollbacks == 2, f"{pod.counters().rollbacks} rollbacks instead of 2"
        same_bits(pod.newest(), self._expected)
        return counts


def build(directory: Path) -> Path:
    """The library; skips where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) to move a process's clock with")
    library = directory / "clock.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library
