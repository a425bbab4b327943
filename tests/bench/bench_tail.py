"""Fault rows 5 and 18: does training wait for Redis, a sidecar or the disk? The tail of its steps with and without.

.venv/bin/python tests/bench/bench_tail.py [--rounds 30] [--steps 400] [--only redis-frozen,disk-full] [--disk DIR]

A real trainer loop in a process of its own (perceptron H=64, a durable save every hundred steps, no epoch's end within
a block) beside real weatherlight, kasmina, tamiyo and Redis. Blocks of steps take turns with and without a fault; the
order within a pair alternates. The fault begins before its block and ends after it, so what its beginning and its
mending cost the machine (a process that starts and imports) is in no block.

A step lasts from one look for halts to the next. It is slow when it takes 1 ms more than the median of its pair's block
without the fault. What a machine does to a thread (another process gets the core) makes steps slow on both sides; a
thread that waits for somebody gives the core away by itself, which the kernel counts. So of slow steps those are told
apart in which the training thread waited. Judged is the difference of their counts, per 1,000 steps.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import redis
from esper_runtime.tolaria.loop import train
from esper_runtime.tolaria.outcome import Outcome

from tests.bench import nerves
from tests.bench.common import difference, machine, section, tail
from tests.bench.nerves import CODE, KASMINA, TAMIYO, WEATHERLIGHT, NervesPod
from tests.support.redis_server import RedisServer
from tests.support.shim import Shim, build
from tests.support.sidecars import Sidecar
from tests.support.trainers import PAUSED, Pod
from tests.support.weatherlight import UID

ALLOWED_MS = 1.0
SETTLE_S = 0.3
"""After a fault, for what has to reconnect and catch up; before the next block."""
WARM_UP = 300
SLOW: tuple[tuple[str, int, int], ...] = (("sync", 0, 50), ("write", 0, 5))
FULL: tuple[tuple[str, int, int], ...] = (("write", errno.ENOSPC, 0), ("size", errno.ENOSPC, 0))


# The trainer's process


class Watch:
    """In the place of Control: when each step begins, and how often its thread has waited by then."""

    def __init__(self, pod: Pod) -> None:
        parts, self._state = pod.assemble()
        self._control: Any = parts.control
        self._parts = dataclasses.replace(parts, control=self)  # type: ignore[arg-type]
        self._marks: list[tuple[int, int]] = []
        self._pause_at = 0

    def poll(self) -> Outcome | None:
        self._marks.append((time.perf_counter_ns(), resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw))
        stop: Outcome | None = self._control.poll()
        return PAUSED if stop is None and self._state.step >= self._pause_at else stop

    def block(self, steps: int) -> list[tuple[int, int]]:
        """(nanoseconds, times waited) of each step. A block in which an epoch ends, with its save, is made again."""
        epoch = -1
        while self._state.epoch != epoch:
            self._marks = []
            self._pause_at, epoch = self._state.step + steps, self._state.epoch
            assert train(self._parts, self._state) is PAUSED
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(self._marks)]


def be_trainer(directory: Path) -> None:
    """Reads numbers of steps, a line each, and writes what each block took."""
    sys.path.insert(0, str(CODE))
    watch = Watch(Pod(directory, uid=UID))
    for line in sys.stdin:
        print(json.dumps(watch.block(int(line))), flush=True)


@dataclass(frozen=True, slots=True)
class Block:
    """Steps in order."""

    ms: list[float]
    waited: list[bool]

    def slow(self, floor_ms: float) -> tuple[int, int]:
        """Steps that took ALLOWED_MS more than the floor, and those of them in which the thread waited."""
        late = [waited for ms, waited in zip(self.ms, self.waited, strict=True) if ms > floor_ms + ALLOWED_MS]
        return len(late), sum(late)


class Trainer:
    """Here: that process."""

    def __init__(self, directory: Path, environ: dict[str, str], log: Path) -> None:
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--trainer", str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environ,
            )
        self._log = log

    def block(self, steps: int) -> Block:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        print(steps, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, f"the trainer ended: {self._log.read_text()[-2000:]}"
        found = json.loads(answer)
        return Block([ns / 1e6 for ns, _ in found], [bool(times) for _, times in found])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


# Faults


class Faults:
    """Each a context: the fault is there inside it."""

    def __init__(self, pod: NervesPod, server: RedisServer, shim: Shim, sidecars: Sequence[Sidecar]) -> None:
        self._pod, self._server, self._shim, self._sidecars = pod, server, shim, sidecars

    @contextlib.contextmanager
    def redis_frozen(self) -> Iterator[None]:
        self._server.freeze()
        yield
        self._server.thaw()

    def redis_killed(self) -> AbstractContextManager[None]:
        return nerves.redis_down(self._server)

    @contextlib.contextmanager
    def redis_full(self) -> Iterator[None]:
        with redis.Redis(port=self._server.port) as admin:
            admin.config_set("maxmemory", "1mb")
            yield
            admin.config_set("maxmemory", "0")

    @contextlib.contextmanager
    def sidecars_frozen(self) -> Iterator[None]:
        frozen = [sidecar for sidecar in (*self._sidecars, self._weatherlight)]
        for sidecar in frozen:
            sidecar.freeze()
        yield
        for sidecar in frozen:
            sidecar.thaw()

    @contextlib.contextmanager
    def weatherlight_killed(self) -> Iterator[None]:
        self._weatherlight.kill()
        yield
        self._pod.start(WEATHERLIGHT)

    def disk_slow(self) -> AbstractContextManager[None]:
        return self._injected(SLOW)

    def disk_full(self) -> AbstractContextManager[None]:
        return self._injected(FULL)

    @contextlib.contextmanager
    def _injected(self, faults: tuple[tuple[str, int, int], ...]) -> Iterator[None]:
        self._shim.inject(*faults)
        yield
        self._shim.inject()

    @property
    def _weatherlight(self) -> Sidecar:
        assert self._pod.weatherlight is not None
        return self._pod.weatherlight


NAMES = (
    "redis-frozen",
    "redis-killed",
    "redis-full",
    "sidecars-frozen",
    "weatherlight-killed",
    "disk-slow",
    "disk-full",
)


def measure(trainer: Trainer, fault: Callable[[], AbstractContextManager[None]], rounds: int, steps: int) -> list[Any]:
    """Pairs of blocks: with the fault, without."""
    pairs = []
    for number in range(rounds):
        found: dict[bool, Block] = {}
        for faulty in (True, False) if number % 2 else (False, True):
            if faulty:
                with fault():
                    found[True] = trainer.block(steps)
                time.sleep(SETTLE_S)
            else:
                found[False] = trainer.block(steps)
        pairs.append((found[True], found[False]))
    return pairs


def tell(name: str, pairs: list[tuple[Block, Block]]) -> None:
    section(name)
    steps = len(pairs[0][0].ms)
    floors = [statistics.median(without.ms) for _, without in pairs]
    for word, side in (("with", 0), ("without", 1)):
        print(tail(f"a step, {word} it", [ms for pair in pairs for ms in pair[side].ms]))
    slow = {
        word: [pair[side].slow(floor) for pair, floor in zip(pairs, floors, strict=True)]
        for word, side in (("with", 0), ("without", 1))
    }
    for word, counts in slow.items():
        print(
            f"  slow steps {word} it: {sum(late for late, _ in counts)} of {steps * len(pairs)}, "
            f"in {sum(waiting for _, waiting in counts)} of them the thread waited"
        )
    for title, index, judged in (("slow steps", 0, False), ("slow steps that waited", 1, True)):
        values, floor = ([count[index] * 1e3 / steps for count in slow[word]] for word in ("with", "without"))
        goal = {"goal": "rows 5, 18", "limit": 0.0} if judged else {}
        print(difference(title, values, floor, unit="per 1,000", **goal), flush=True)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=400, help="per block")
    parser.add_argument("--only", default=",".join(NAMES), help="faults, separated by commas")
    parser.add_argument("--disk", type=Path, help="directory on the disk of checkpoints; default: of temporary files")
    parser.add_argument("--trainer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trainer is not None:
        be_trainer(arguments.trainer)
        return
    print(machine())
    with (
        nerves.places(arguments.disk) as (memory, durable),
        nerves.redis_server(durable) as server,
        NervesPod(memory, durable, redis_url=server.url) as pod,
    ):
        pod.never_ending(save_every=100)
        pod.start(WEATHERLIGHT)
        sidecars = [pod.sidecars.start(name) for name in (KASMINA, TAMIYO)]
        shim = Shim(build(durable), durable, durable / "control")
        with Trainer(memory, pod.trainer_environ(**shim.environment), durable / "trainer.log") as trainer:
            trainer.block(WARM_UP)
            faults = Faults(pod, server, shim, sidecars)
            for name in arguments.only.split(","):
                fault = getattr(faults, name.replace("-", "_"))
                tell(name, measure(trainer, fault, arguments.rounds, arguments.steps))


if __name__ == "__main__":
    main()
