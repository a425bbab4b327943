"""P1: Esper's loop with every protection on, against the plain PyTorch loop of the same model, data and optimizer.

.venv/bin/python tests/bench/bench_overhead.py [--rounds 30] [--seconds 9] [--threads 1] [--only digits] [--explain 2]

Esper's side is the real loop on the real parts: finite check of loss and gradient before the optimizer steps, loss
spikes judged, heartbeat page written and emergency page read every step, a memory snapshot with its digest every ten
steps (checkpoint.memory.everySteps at its default). The plain side takes the same batches in the same order and does
zero_grad, forward, backward, step and loss.item(). Sides take turns, a round of steps each, in one process; the order
within a round alternates too. Not in it: validation, durable checkpoints (a thread of their own) and sidecars.

Two clocks: the wall, and the CPU time of the training thread, which other processes on the machine disturb less. With
one thread nothing waits, so both say the same on an idle machine. A user who asks for fused=True gets it on both sides.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from esper_runtime.tolaria.data import Loader
from esper_runtime.tolaria.loop import Parts
from esper_runtime.tolaria.state import TrainState
from torch import Tensor

from tests.bench.breakdown import Clocks, table, watch
from tests.bench.code import benchload
from tests.bench.common import machine, ratio, row, section, timed
from tests.support.trainers import PAUSED, Pod, Turns

CODE = Path(__file__).with_name("code")
ROUND_S = 0.1
CASES = (
    ("64", "adamw"),
    ("64", "sgd"),
    ("64", "adamw-fused"),
    ("512", "adamw"),
    ("512", "adamw-fused"),
    ("digits", "adamw"),
    ("chars", "adamw"),
    ("chars", "adamw-fused"),
    ("3072", "adamw"),
    ("3072", "adamw-fused"),
)
"""Model and optimizer. Perceptrons by their width (3072: 9.7 million parameters), a small convolutional network, and
the character model."""
DEFAULTS_LIMIT, FUSED_LIMIT = 1.00, 1.02


@dataclass(frozen=True, slots=True)
class Esper:
    """The protected side."""

    run: Callable[[int], None]
    parts: Parts
    state: TrainState


def esper_side(directory: Path, model: str, optimizer: str, threads: int) -> Esper:
    pod = Pod(directory)
    pod.configure(entrypoint="benchload:build", checkpoint={})
    pod.document["config"] = {"model": model, "optimizer": optimizer, "threads": threads}
    pod.write_config()
    parts, state = pod.assemble()
    turns = Turns(parts, state)

    def run(steps: int) -> None:
        assert turns.run(steps) is PAUSED

    return Esper(run, parts, state)


def plain_side(model: str, optimizer: str, clocks: Clocks | None = None) -> Callable[[int], None]:
    """The loop that a PyTorch user writes; with clocks around its parts where they are given."""
    torch.manual_seed(0)
    load = benchload.build({"model": model, "optimizer": optimizer})
    network = load.model.train()
    chosen = load.optimizer(network.parameters())
    loader = Loader(
        load.train, batch_size=load.batch_size, seed=load.seed, device=torch.device("cpu"), transform=load.transform
    )
    total = 0.0
    take, evaluate, backward = loader.take, load.loss, Tensor.backward
    clear, update, item = chosen.zero_grad, chosen.step, Tensor.item
    if clocks is not None:
        take, evaluate, backward = (
            clocks.around("batch", take),
            clocks.around("forward and loss", evaluate),
            clocks.around("backward", backward),
        )
        clear, update = clocks.around("clear gradients", clear), clocks.around("optimizer", update)

    def run(steps: int) -> None:
        nonlocal total
        for _ in range(steps):
            batch = take()
            assert batch is not None, "the epoch is too short for so many rounds"
            clear()
            loss = evaluate(network, batch)
            backward(loss)
            update()
            total += item(loss)

    return run


def explain(esper: Esper, model: str, optimizer: str, steps: int, seconds: float) -> str:
    """The breakdown of one case, measured by itself after the ratios."""
    clocks, plain_clocks = Clocks(), Clocks()
    watch(esper.parts, esper.state, clocks)
    plain = plain_side(model, optimizer, plain_clocks)
    taken: dict[str, list[dict[str, int]]] = {"esper": [], "plain": []}
    whole: dict[str, list[float]] = {"esper": [], "plain": []}
    esper.run(steps), plain(steps), clocks.take(), plain_clocks.take()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, side, clock in (("esper", esper.run, clocks), ("plain", plain, plain_clocks)):
            whole[name].append(timed(lambda side=side: side(steps)) / steps * 1e6)  # type: ignore[misc]
            taken[name].append(clock.take())
    medians = statistics.median(whole["esper"]), statistics.median(whole["plain"])
    return table(taken["esper"], taken["plain"], medians, steps)


@dataclass
class Series:
    """Milliseconds per step of one side, a value per round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, side: Callable[[int], None], steps: int) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        side(steps)
        self.wall.append((time.perf_counter() - wall) / steps * 1e3)
        self.cpu.append((time.thread_time() - cpu) / steps * 1e3)


def measure(sides: dict[str, Callable[[int], None]], rounds: int, seconds: float) -> tuple[dict[str, Series], int]:
    """What each side took, and steps per round."""
    plain = sides["plain"]
    plain(10)
    steps = max(5, round(ROUND_S / (timed(lambda: plain(10)) / 10) / 10) * 10)
    for side in sides.values():
        side(steps)
    gc.collect()
    taken = {name: Series() for name in sides}
    end = time.monotonic() + seconds
    for number in range(rounds):
        if time.monotonic() > end:
            break
        names = list(sides)
        for name in names if number % 2 else reversed(names):
            taken[name].add(sides[name], steps)
    return taken, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=9.0, help="at most so long per case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="a model: digits, chars, 64, 512, 3072")
    parser.add_argument("--explain", type=float, default=2.0, metavar="S", help="seconds for a breakdown; 0: none")
    arguments = parser.parse_args()
    sys.path.insert(0, str(CODE))
    print(f"{machine()}, torch {torch.__version__}, {arguments.threads} thread(s)")
    for model, optimizer in CASES:
        if arguments.only not in ("", model):
            continue
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            esper = esper_side(Path(directory), model, optimizer, arguments.threads)
            torch.set_num_threads(arguments.threads)
            sides = {"plain": plain_side(model, optimizer), "esper": esper.run}
            taken, steps = measure(sides, arguments.rounds, arguments.seconds)
            parameters = sum(parameter.numel() for parameter in esper.state.model.parameters())
            path = esper.state.update.path
            section(f"{model}, {optimizer}: {parameters:,} parameters, optimizer path {path}, {steps} steps a round")
            for name, series in taken.items():
                print(row(f"{name}, wall per step", series.wall))
                print(row(f"{name}, CPU per step", series.cpu))
            limit = FUSED_LIMIT if optimizer.endswith("fused") else DEFAULTS_LIMIT
            print(ratio("esper / plain, wall", taken["esper"].wall, taken["plain"].wall, goal="P1", limit=limit))
            print(ratio("esper / plain, CPU", taken["esper"].cpu, taken["plain"].cpu))
            if arguments.explain:
                print(explain(esper, model, optimizer, steps, arguments.explain))


if __name__ == "__main__":
    main()
