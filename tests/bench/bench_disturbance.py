"""P4: what memory snapshots cost the steps that take none.

.venv/bin/python tests/bench/bench_disturbance.py [--seconds 60] [--only 3072]

One trainer in one process. Blocks of 50 steps take turns, with a snapshot after every tenth step (the default) and
without any, the order within a pair alternating; ten steps before each block are not timed. A step lasts from one look
for halts to the next. Of both kinds of block the 45 steps are compared that take no snapshot where snapshots are on:
what is left is what a snapshot does to the steps after it by the caches that it has emptied and the pages that it has
touched. The stall itself is P3; with it is the line "all steps". The lines between tell which step pays.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from esper_runtime.tolaria.loop import train
from esper_runtime.tolaria.outcome import Outcome

from tests.bench.bench_overhead import CODE, Esper, esper_side
from tests.bench.common import machine, ratio, row, section
from tests.support.trainers import PAUSED

MODELS = ("512", "3072")
EVERY = 10
STEPS = 50
NEVER = 1 << 40
LIMIT = 1.01


class Stopwatch:
    """In the place of Control: notes when each step begins, and pauses after a block."""

    def __init__(self, esper: Esper) -> None:
        self._control: Any = esper.parts.control
        self._esper = esper
        self._parts = dataclasses.replace(esper.parts, control=self)  # type: ignore[arg-type]
        self._wall: list[float] = []
        self._cpu: list[float] = []
        self._pause_at = 0

    def poll(self) -> Outcome | None:
        self._wall.append(time.perf_counter())
        self._cpu.append(time.thread_time())
        stop: Outcome | None = self._control.poll()
        return PAUSED if stop is None and self._esper.state.step >= self._pause_at else stop

    def block(self, every: int) -> tuple[list[float], list[float]]:
        """(wall, CPU) of each of the next steps, in milliseconds."""
        memory, state = self._esper.parts.memory, self._esper.state
        memory.config = dataclasses.replace(memory.config, memory_every_steps=every)
        epoch = state.epoch
        for steps in (EVERY, STEPS):
            self._wall, self._cpu = [], []
            self._pause_at = state.step + steps
            assert train(self._parts, state) is PAUSED
        assert state.epoch == epoch, "the epoch is too short for so many blocks"
        return _differences(self._wall), _differences(self._cpu)


def _differences(times: list[float]) -> list[float]:
    return [(after - before) * 1e3 for before, after in pairwise(times)]


Pair = dict[str, list[float]]
"""Milliseconds of each step of a block, by "with" and "without"."""


def measure(esper: Esper, seconds: float) -> tuple[list[Pair], list[Pair]]:
    """Pairs of blocks: (wall, CPU)."""
    watch = Stopwatch(esper)
    cadences = {"with": EVERY, "without": NEVER}
    for every in cadences.values():
        watch.block(every)
    wall: list[Pair] = []
    cpu: list[Pair] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(wall) < 4:
        names = list(cadences) if len(wall) % 2 else list(reversed(cadences))
        pair = {name: watch.block(cadences[name]) for name in names}
        wall.append({name: block[0] for name, block in pair.items()})
        cpu.append({name: block[1] for name, block in pair.items()})
    return wall, cpu


def summed(pairs: list[Pair], name: str, after: range) -> list[float]:
    """Milliseconds per block of the steps that come so many after a snapshot; a block begins right after one."""
    return [sum(ms for at, ms in enumerate(pair[name]) if at % EVERY + 1 in after) for pair in pairs]


def tell(wall: list[Pair], cpu: list[Pair]) -> None:
    quiet = range(1, EVERY)
    for clock, pairs in (("wall", wall), ("CPU", cpu)):
        ours, plain = summed(pairs, "with", quiet), summed(pairs, "without", quiet)
        print(row(f"45 steps without, {clock}", plain))
        print(ratio(f"45 steps, {clock}", ours, plain, goal="P4", limit=LIMIT if clock == "wall" else None))
        for name, after in {"1st": range(1, 2), "2nd": range(2, 3), "3rd to 9th": range(3, EVERY)}.items():
            compared = summed(pairs, "with", after), summed(pairs, "without", after)
            print(ratio(f"  {name} after a snapshot, {clock}", *compared))
        everything = range(1, EVERY + 1)
        print(ratio(f"all steps, {clock}", summed(pairs, "with", everything), summed(pairs, "without", everything)))
    stall = [statistics.median(pair["with"][EVERY - 1 :: EVERY]) for pair in wall]
    usual = [statistics.median(pair["without"][EVERY - 1 :: EVERY]) for pair in wall]
    print(row("stall", [one - other for one, other in zip(stall, usual, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most so long per model")
    parser.add_argument("--only", default="", help="a model: 512, 3072")
    arguments = parser.parse_args()
    sys.path.insert(0, str(CODE))
    print(f"{machine()}, torch {torch.__version__}")
    for model in MODELS:
        if arguments.only not in ("", model):
            continue
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            esper = esper_side(Path(directory), model, "adamw", 1)
            wall, cpu = measure(esper, arguments.seconds)
            parameters = sum(parameter.numel() for parameter in esper.state.model.parameters())
        section(f"{model}: {parameters:,} parameters, blocks of {STEPS} steps, a snapshot every {EVERY}")
        tell(wall, cpu)


if __name__ == "__main__":
    main()
