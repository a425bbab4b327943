"""What telemetry costs a step: heartbeat page, metrics, record and events, on against off in the same loop.

.venv/bin/python tests/bench/bench_telemetry.py [--rounds 60] [--models 64,512]

The real loop with real parts; "off" leaves out what tells others: the heartbeat after every step and the publisher,
which once a second writes metrics and the record. A real weatherlight reads pages and journal beside both. Blocks take
turns and the order within a pair alternates. The difference is microseconds per step, of wall and of the training
thread; P1 (bench_overhead) has telemetry on and is to be met with it. Below: what one line costs the thread that says
it, which is to be at most 2 ms (T49).
"""

import argparse
import dataclasses
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_leyline.events import RunEvent
from esper_runtime.tolaria.loop import train
from esper_runtime.tolaria.outcome import Outcome

from tests.bench.bench_overhead import CODE, ROUND_S, Esper, Series, esper_side
from tests.bench.common import difference, machine, row, section, tail, timed
from tests.support.sidecars import Sidecar
from tests.support.trainers import PAUSED
from tests.support.weatherlight import PodFiles

LINE_LIMIT_MS = 2.0
LINES = 2000


class Silence:
    """Tells nobody: in the place of heartbeat and publisher."""

    def progress(self, **_: object) -> None: ...

    def after_step(self, _: object) -> None: ...


class Sides:
    """One trainer that makes steps with telemetry and without."""

    def __init__(self, esper: Esper) -> None:
        self._state, self._control = esper.state, esper.parts.control
        on = dataclasses.replace(esper.parts, control=self)  # type: ignore[arg-type]
        silence: Any = Silence()
        self._parts = {"on": on, "off": dataclasses.replace(on, heart=silence, publisher=silence)}
        self._pause_at = 0

    def poll(self) -> Outcome | None:
        """In the place of Control's, which is asked first."""
        stop: Outcome | None = self._control.poll()
        return PAUSED if stop is None and self._state.step >= self._pause_at else stop

    def make_room(self, steps: int) -> None:
        """No epoch ends within the next `steps`."""
        state = self._state
        if state.total_steps(state.epoch + 1) - state.step <= steps:
            epoch = state.epoch
            while state.epoch == epoch:
                self._pause_at = state.step + 10
                assert train(self._parts["on"], state) is PAUSED

    def side(self, name: str) -> Callable[[int], None]:
        def run(steps: int) -> None:
            self._pause_at, epoch = self._state.step + steps, self._state.epoch
            assert train(self._parts[name], self._state) is PAUSED
            assert self._state.epoch == epoch, "the epoch is too short for so many blocks"

        return run


def measure(sides: Sides, rounds: int) -> tuple[dict[str, Series], int]:
    """Series per side, and steps per block."""
    runs = {name: sides.side(name) for name in ("on", "off")}
    runs["off"](20)
    steps = max(10, round(ROUND_S / (timed(lambda: runs["off"](20)) / 20) / 10) * 10)
    for run in runs.values():
        run(steps)
    gc.collect()
    taken = {name: Series() for name in runs}
    for number in range(rounds):
        for name in runs if number % 2 else reversed(runs):
            sides.make_room(steps)
            taken[name].add(runs[name], steps)
    return taken, steps


def tell(taken: dict[str, Series]) -> None:
    for clock in ("wall", "cpu"):
        on, off = ([ms * 1e3 for ms in getattr(taken[name], clock)] for name in ("on", "off"))
        print(row(f"off, {clock} per step", off, unit="µs"))
        print(row(f"on, {clock} per step", on, unit="µs"))
        print(difference(f"telemetry, {clock} per step", on, off, unit="µs"))
        share = (statistics.median(on) - statistics.median(off)) / statistics.median(off)
        print(f"  {'of a step':30} {share * 100:+.2f} %")


def lines(esper: Esper) -> None:
    """What it takes to say something, and how long a step takes to hand over its batch's telemetry."""
    publisher: Any = esper.parts.publisher
    events, record, state = publisher._events, publisher._record, esper.state
    calls: dict[str, Callable[[], object]] = {
        "heartbeat": lambda: esper.parts.heart.progress(step=1, epoch=1, loss=0.5),
        "event into journal and record": lambda: events.notice("FaultInjected", "a line of some length, as they are"),
        "line of the record": lambda: record.append(RunEvent.PROGRESS, step=state.step, loss=0.5),
        "a step's hand-over": lambda: publisher.after_step(state),
    }
    section("saying something")
    for name, call in calls.items():
        found = []
        for _ in range(LINES):
            found.append(timed(call) * 1e3)
            time.sleep(0.0002)  # the record's thread writes beside it, as it does while a step is computed
        print(tail(name, found, goal="T49", limit=LINE_LIMIT_MS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--models", default="64,512", help="widths of the perceptron")
    arguments = parser.parse_args()
    sys.path.insert(0, str(CODE))
    print(machine())
    for model in arguments.models.split(","):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            esper = esper_side(Path(directory), model, "adamw-still", 1)
            files = PodFiles(Path(directory))
            weatherlight = Sidecar(
                "weatherlight", files.run_dir, {**os.environ, **files.environment}, files.root / "log"
            )
            try:
                weatherlight.wait_ready()
                taken, steps = measure(Sides(esper), arguments.rounds)
                section(f"perceptron of width {model}, {steps} steps a block")
                tell(taken)
                lines(esper)
            finally:
                weatherlight.kill()


if __name__ == "__main__":
    main()
