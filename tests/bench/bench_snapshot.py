"""P3: what a memory snapshot takes from the training thread, against memmove of the same bytes.

.venv/bin/python tests/bench/bench_snapshot.py [--rounds 60] [--seconds 15] [--only 3072] [--sizes 1,16,256]

Esper's side is all that training waits for: facts and random states are gathered, every byte is copied into the slot,
hashed (128 bits) and checked to be finite, from 8 MiB on by a second thread meanwhile, and the slot is sealed; nothing
is left for later. The floor is one memmove of as many bytes into memory of the same kind, as many places taking turns
as there are slots. Rounds alternate, and before each measurement a buffer larger than the second-level cache is
written, as a training step would. CPU time is that of the training thread: other processes on the machine disturb it
less. The lines between say what copy, hash and check, and gathering the state, cost by themselves in one thread; what
is left is the header, its JSON and the ring.

Then the same for states of any size (MiB of parameters and moments), where they fit, with what every further MiB costs.
"""

import argparse
import ctypes
import itertools
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import xxhash
from esper_runtime.tolaria import rng
from esper_runtime.tolaria.loop import Parts
from esper_runtime.tolaria.slot import CHUNK_BYTES
from esper_runtime.tolaria.state import TrainState

from tests.bench.bench_overhead import CODE
from tests.bench.common import machine, ratio, row, section
from tests.bench.sizes import MIB, SIZES, Point, fits, rounds_within, sizes_of, tell
from tests.support.trainers import PAUSED, Pod, Turns

MODELS = ("64", "512", "digits", "3072")
SHARED = Path("/dev/shm")
LIMIT = 1.5
EVICT_ELEMENTS = 1024 * 1024
LARGE_BYTES = 256 * MIB
"""No cache keeps anything of such a state to the next round."""


def trained(directory: Path, config: dict[str, Any], *, every: int = 10, slots: int = 3) -> tuple[Parts, TrainState]:
    """A trainer of benchload that has snapshots, the older of them good."""
    pod = Pod(directory)
    memory = {"everySteps": every, "snapshots": slots}
    pod.configure(entrypoint="benchload:build", checkpoint={"memory": memory}, rollback={"maxRollbacks": 100_000})
    pod.document["config"] = {"threads": 1, **config}
    pod.write_config()
    parts, state = pod.assemble()
    assert Turns(parts, state).run(every + 2) is PAUSED
    return parts, state


def sides(directory: Path, config: dict[str, Any], **options: int) -> tuple[dict[str, Callable[[], object]], int]:
    """What is timed, by name, and the bytes of the state. `options`: of `trained`."""
    parts, state = trained(directory, config, **options)
    memory = parts.memory
    tensors = list(state.live()[0].values())
    size = sum(tensor.nbytes for tensor in tensors)
    source = np.concatenate([tensor.detach().reshape(-1).view(torch.uint8).numpy() for tensor in tensors])
    assert memory.snapshots is not None
    places = itertools.cycle(shared(directory / "floor", size, memory.snapshots.count if size < LARGE_BYTES else 1))

    def memmove() -> None:
        ctypes.memmove(next(places).ctypes.data, source.ctypes.data, size)

    def hashed(check: bool) -> None:
        digest = xxhash.xxh3_128()
        place = next(places)
        for begin in range(0, size, CHUNK_BYTES):
            end = min(begin + CHUNK_BYTES, size)
            place[begin:end] = source[begin:end]
            digest.update(place[begin:end])
            if check:
                piece = place[begin : end // 4 * 4].view(np.float32)
                np.dot(piece, piece)
        digest.intdigest()

    return {
        "memmove": memmove,
        "snapshot": lambda: memory.capture(state, good=False),
        "copy and hash": lambda: hashed(False),
        "copy, hash and check": lambda: hashed(True),
        "gathering the state": state.live,
        "of it random states": rng.capture,
    }, size


def shared(path: Path, size: int, count: int) -> list["np.ndarray[Any, Any]"]:
    """Places like those of the slots: as many, in a file of the memory volume, touched."""
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(descriptor, 0, room * count)
    whole = np.frombuffer(mmap.mmap(descriptor, room * count, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), np.uint8)
    os.close(descriptor)
    return [whole[number * room : number * room + size] for number in range(count)]


def measure(timed: dict[str, Callable[[], object]], rounds: int, seconds: float) -> tuple[dict[str, list[float]], ...]:
    """(wall, CPU) in milliseconds by name."""
    evict = torch.zeros(EVICT_ELEMENTS)
    wall: dict[str, list[float]] = {name: [] for name in timed}
    cpu: dict[str, list[float]] = {name: [] for name in timed}
    for number in rounds_within(seconds, most=rounds):
        for name in timed if number % 2 else reversed(timed):
            evict.add_(1.0)
            began, burnt = time.perf_counter(), time.thread_time()
            timed[name]()
            cpu[name].append((time.thread_time() - burnt) * 1e3)
            wall[name].append((time.perf_counter() - began) * 1e3)
    return wall, cpu


def sweep(sizes: list[int], rounds: int, seconds: float) -> None:
    points: list[Point] = []
    for mib in sizes:
        # Live: state, gradients, its copy; in the memory volume: two slots and the floor's places.
        if not fits(mib, memory=7, shared=(SHARED, 4)):
            continue
        with tempfile.TemporaryDirectory(dir=SHARED) as directory:
            found, size = sides(Path(directory), {"model": "state", "state_bytes": mib * MIB}, every=1, slots=2)
            wall, cpu = measure({name: found[name] for name in ("memmove", "snapshot")}, rounds, seconds)
        section(f"{mib} MiB")
        print(row("snapshot, wall", wall["snapshot"]))
        print(ratio("snapshot / memmove, wall", wall["snapshot"], wall["memmove"], goal="P3", limit=LIMIT))
        print(ratio("snapshot / memmove, CPU", cpu["snapshot"], cpu["memmove"]))
        points.append(Point(size / MIB, wall["snapshot"], wall["memmove"]))
    tell("snapshot against memmove", points, goal="P3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=15.0, help="at most so long per model or size")
    parser.add_argument("--only", default="", help="a model: digits, 64, 512, 3072; or sizes")
    parser.add_argument("--sizes", default=SIZES, help="MiB of state, separated by commas")
    arguments = parser.parse_args()
    sys.path.insert(0, str(CODE))
    print(f"{machine()}, torch {torch.__version__}")
    for model in MODELS:
        if arguments.only not in ("", model):
            continue
        with tempfile.TemporaryDirectory(dir=SHARED) as directory:
            timed, size = sides(Path(directory), {"model": model})
            wall, cpu = measure(timed, arguments.rounds, arguments.seconds)
        section(f"{model}: {size / 2**20:.2f} MiB of parameters, moments and buffers")
        for name, values in cpu.items():
            print(row(f"{name}, CPU", values))
        print(row("snapshot, wall", wall["snapshot"]))
        print(ratio("snapshot / memmove, wall", wall["snapshot"], wall["memmove"], goal="P3", limit=LIMIT))
        print(ratio("snapshot / memmove, CPU", cpu["snapshot"], cpu["memmove"]))
    if arguments.only in ("", "sizes"):
        sweep(sizes_of(arguments.sizes), arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
