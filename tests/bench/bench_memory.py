"""T47: the memory that protection takes: snapshots, copies for durable saves, and the rest.

.venv/bin/python tests/bench/bench_memory.py [--rounds 3] [--only 3072] [--no-pod]

Two fresh processes per round train the same model for as many steps: the loop that a PyTorch user writes, and Esper's
trainer with its defaults, which also makes two durable saves at once, the second while the disk is still busy with the
first: that is the most it ever holds. Resident memory is read where the process starts, after its imports, after it has
built everything and after training, and its peak at the end; pages of the memory volume count as the trainer's.

The slots hold whole states: parameters, moments and buffers. "rest" is what is left of the difference of the peaks.
Then, once, the pages of their own of every other process in the pod, sidecars as bare processes.

Two limits of the specification: 8.5 % more memory than without protection, and checkpoints within 8 % of the device's
memory, of which model and optimizer take 65 %. On a CPU the device's memory is the host's, and slots and copies lie in
it too. A snapshot is as large as the state and there are never fewer than two: so the first can hold only for a state
that is small beside the process, the second only for one of at most 4 % of the memory. With a GPU slots and copies lie
in the host's memory, not in the device's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.common import machine, ratio, row, section

CODE = Path(__file__).with_name("code")
MODELS = ("512", "3072")
STEPS = 60
LIMIT = 1.085
CHECKPOINT_SHARE, STATE_SHARE, FEWEST = 0.08, 0.65, 2
"""Of the device's memory, by the specification; and snapshots."""
MIB = 1 << 20
Report = Callable[[str], None]


# In a process of its own


def resident() -> dict[str, float]:
    """MiB: all, private, peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"resident": "VmRSS", "private": "RssAnon", "peak": "VmHWM"}
    return {name: int(lines[key].split()[0]) / 1024 for name, key in names.items()}


def config_of(model: str) -> dict[str, Any]:
    return {"model": model, "threads": 1, "steps": 2 * STEPS}


def bare(model: str, mark: Report) -> dict[str, float]:
    import bareloop

    mark("imported")
    steps = bareloop.steps_of(config_of(model))
    next(steps)
    mark("built")
    for _ in range(STEPS - 1):
        next(steps)
    mark("trained")
    return {}


def esper(model: str, mark: Report) -> dict[str, float]:
    from tests.support.trainers import PAUSED, Pod, Turns, close

    mark("imported")
    with ExitStack() as stack:
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        (memory / "checkpoints").symlink_to(stack.enter_context(tempfile.TemporaryDirectory()))
        pod = Pod(memory)
        pod.configure(entrypoint="benchload:build", checkpoint={})
        pod.document["config"] = config_of(model)
        pod.write_config()
        parts, state = pod.assemble()
        turns = Turns(parts, state)
        assert turns.run(1) is PAUSED
        mark("built")
        assert turns.run(STEPS - 1) is PAUSED
        mark("trained")
        snapshots = parts.memory.snapshots
        assert snapshots is not None
        before = resident()["private"]
        for _ in range(2):
            parts.checkpoints.submit(state, {})
        copies = resident()["private"] - before
        parts.checkpoints.wait()
        mark("saved")
        found = {
            "state": sum(tensor.nbytes for tensor in state.live()[0].values()) / MIB,
            "slots": snapshots.size_bytes / MIB,
            "count": float(snapshots.count),
            "copies": copies,
        }
        close(parts)
        return found


def child(kind: str, model: str) -> None:
    stages: dict[str, float] = {}

    def mark(stage: str) -> None:
        stages[stage] = resident()["resident"]

    mark("started")
    found = {"bare": bare, "esper": esper}[kind](model, mark)
    print(json.dumps({**found, **stages, "peak": resident()["peak"]}))


# Beside it


def measured(kind: str, model: str) -> dict[str, float]:
    environ = {**os.environ, "PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", kind, model]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True, slots=True)
class Model:
    """Rounds of both sides, MiB by name."""

    name: str
    bare: list[dict[str, float]]
    esper: list[dict[str, float]]

    def series(self, side: str, part: str) -> list[float]:
        return [found[part] for found in getattr(self, side)]

    def rest(self) -> list[float]:
        return [
            ours["peak"] - plain["peak"] - ours["slots"] - ours["copies"]
            for ours, plain in zip(self.esper, self.bare, strict=True)
        ]


def tell(model: Model) -> None:
    ours = model.esper[-1]
    state, slots, count = ours["state"], ours["slots"], round(ours["count"])
    section(f"{model.name}: a state of {state:.1f} MiB")
    for side in ("bare", "esper"):
        last = getattr(model, side)[-1]
        stages = (stage for stage in ("started", "imported", "built", "trained", "saved") if stage in last)
        print(f"  {side:8} " + ", ".join(f"{stage} {last[stage]:.0f}" for stage in stages) + " MiB resident")
        print(row(f"{side}, peak", model.series(side, "peak"), unit="MiB"))
    print(row(f"{count} snapshot slots", model.series("esper", "slots"), unit="MiB"))
    print(row("copies for durable saves", model.series("esper", "copies"), unit="MiB"))
    print(row("rest", model.rest(), unit="MiB"))
    peaks = model.series("esper", "peak"), model.series("bare", "peak")
    print(ratio("esper / bare, peak", *peaks, goal="T47", limit=LIMIT))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB
    share = row("slots / this machine's memory", [slots / memory], unit="x", goal="T47", limit=CHECKPOINT_SHARE)
    print(f"{share}\n{verdict(state, count, slots)}")


def verdict(state: float, count: int, slots: float) -> str:
    by_split = FEWEST * STATE_SHARE
    return (
        f"  {count} slots are {slots / state:.2f} states. Where the state takes its {STATE_SHARE:.0%} of the device, "
        f"{FEWEST} snapshots would take {by_split:.0%}, not {CHECKPOINT_SHARE:.0%}:\n"
        f"  on a CPU that limit holds only for a state of at most {CHECKPOINT_SHARE / FEWEST:.0%} of the memory "
        f"({CHECKPOINT_SHARE / count:.1%} with {count}), by construction."
    )


def others() -> float:
    """MiB of every other process of a pod, a spare included."""
    import psutil

    from tests.bench.bench_restart import Bench
    from tests.support.sidecars import Sidecars
    from tests.support.waiting import PATIENT_S, until_sync
    from tests.support.weatherlight import PodFiles

    def own(pid: int) -> float:
        """Pages of the process and its children that no other process has."""
        process = psutil.Process(pid)
        return sum(one.memory_full_info().uss for one in (process, *process.children(recursive=True))) / MIB

    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        sidecars = Sidecars(root)
        stack.callback(sidecars.stop)
        weatherlight = PodFiles(root / "weatherlight")
        stack.callback(weatherlight.close)
        weatherlight.start()
        bench = Bench(stack, "tiny:build", spare=True)
        beat = bench.settle()
        port = weatherlight.run_dir / "weatherlight.port"
        until_sync(port.exists, PATIENT_S, "weatherlight listens")
        assert bench.pod.process is not None
        assert weatherlight.process is not None
        supervisor, children = bench.pod.process.pid, bench.pod.children()
        found = {"spare": sum(own(pid) for pid in children if pid != beat.pid)}
        found["supervisor"] = own(supervisor) - sum(own(pid) for pid in children)
        found["weatherlight"] = own(weatherlight.process.pid)
        found |= {name: own(sidecars.start(name).process.pid) for name in ("kasmina", "tamiyo")}
    section("other processes of the pod, pages of their own")
    total = sum(found.values())
    for name, size in {**found, "all of them": total}.items():
        print(row(name, [size], unit="MiB"))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="a model: 512, 3072")
    parser.add_argument("--no-pod", action="store_true", help="leaves out the other processes of a pod")
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(*arguments.child)
        return
    print(machine())
    models: list[Model] = []
    for name in MODELS:
        if arguments.only in ("", name):
            pairs = [(measured("bare", name), measured("esper", name)) for _ in range(arguments.rounds)]
            models.append(Model(name, [plain for plain, _ in pairs], [ours for _, ours in pairs]))
            tell(models[-1])
    if arguments.no_pod:
        return
    beside = others()
    for model in models:
        pod = [peak + beside for peak in model.series("esper", "peak")]
        print(ratio(f"whole pod / bare, {model.name}", pod, model.series("bare", "peak")))


if __name__ == "__main__":
    main()
