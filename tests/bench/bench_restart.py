"""P10 and P11: how soon a dead or hung trainer is noticed, and how soon the next step follows.

.venv/bin/python tests/bench/bench_restart.py [--rounds 20] [--hangs 5] [--cold 3] [--entrypoint MODULE:FUNCTION]

A real supervisor and a real trainer, memory volumes in /dev/shm, checkpoints on the disk. Per round: once a spare is
ready, SIGKILL to the trainer. "noticed" is SIGKILL until the supervisor has reaped it, by the time that it hands to the
next trainer; "next step" is SIGKILL until the first step of the next trainer is on the heartbeat page. The parts are
the next trainer's own account. "hang noticed" is SIGSTOP until the supervisor says so, beside its goal of three p99 of
the steps seen before plus a second; each hang in a container of its own, since every hang that is found doubles the
patience with the next. A trainer that was stopped inside validation, where no step tells the time and the limit is the
heartbeat timeout, is let go and stopped again. "floor" is SIGKILL until wait() of a process that has imported torch and
does nothing: the kernel takes its memory down first. The cold rounds have no spare.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_leyline import env
from esper_leyline.pages import Heartbeat, PageError
from esper_leyline.v1 import report_pb2 as pb

from tests.bench.common import machine, quantile, row
from tests.support.supervised import Supervised
from tests.support.trainers import CODE

_PARTS = re.compile(r"first step after [\d.]+ ms: (.*)")
_PATIENCE_S = 300.0
_POLL_S = 0.0005
TRAINED = 60
"""Steps before a kill: more than what the hang watch wants to have seen."""


def until(found: Callable[[], object], what: str, poll_s: float = _POLL_S) -> None:
    give_up = time.monotonic() + _PATIENCE_S
    while not found():
        if time.monotonic() > give_up:
            raise TimeoutError(what)
        time.sleep(poll_s)


class Bench:
    """One container under test."""

    def __init__(self, stack: ExitStack, entrypoint: str, *, spare: bool) -> None:
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.pod = Supervised(memory, trainer_module="esper_runtime.tolaria.trainer")
        self.pod.checkpoints.rmdir()
        self.pod.checkpoints.symlink_to(disk)
        (memory / "shm").mkdir()
        self.pod.log = memory / "log"
        self.pod.environ = {env.CODE_DIR: str(CODE), env.SHM_DIR: str(memory / "shm"), "OMP_NUM_THREADS": "1"}
        self.pod.start(
            entrypoint=entrypoint, config={"epochs": 1_000_000}, checkpoint={}, settle_s=0.0 if spare else 1e9
        )
        stack.callback(self.pod.close)
        self.spare = spare

    def beat(self, other_than: int = 0) -> Heartbeat | None:
        """Of a trainer that trains and is not `other_than`."""
        beat = self.pod.beat()
        running = beat is not None and beat.phase == pb.RUNTIME_PHASE_RUNNING and beat.pid != other_than
        return beat if running else None

    def settle(self) -> Heartbeat:
        """Waits for a trainer that has made TRAINED steps of its own and, if wanted, for a spare."""
        until(self.beat, "a trainer")
        first = self.beat()
        assert first is not None
        until(lambda: (now := self.beat()) is not None and now.step >= first.step + TRAINED, "steps", 0.01)
        if self.spare:
            until(lambda: self.pod.metric("spare_ready") == 1, "a spare", 0.1)
        beat = self.beat()
        assert beat is not None
        return beat

    def kill(self) -> dict[str, float]:
        """One round: milliseconds by name."""
        victim = self.settle().pid
        killed_ns = time.monotonic_ns()
        os.kill(victim, signal.SIGKILL)
        until(lambda: self.beat(victim), "the next step")
        until(lambda: self.recoveries() and self.recoveries()[-1].monotonic_ns > killed_ns, "a recovery", 0.01)
        event = self.recoveries()[-1]
        noticed_ms = (event.monotonic_ns - killed_ns) / 1e6 - event.recovery.recover_ms
        assert self.pod.log is not None
        parts = _PARTS.findall(self.pod.log.read_text())[-1]
        found = {"noticed": noticed_ms, "next step": noticed_ms + event.recovery.recover_ms}
        for part in parts.split(", "):
            name, _, value = part.rpartition(" ")
            found[f"  {name}"] = float(value)
        return found

    def recoveries(self) -> list[pb.RuntimeEvent]:
        return [event for event in self.pod.events() if event.WhichOneof("event") == "recovery"]

    def hang(self) -> tuple[float, float]:
        """Milliseconds until a stopped trainer is noticed, and the goal for it."""
        victim = self.settle().pid
        p99_s = quantile(self.step_times(), 0.99)
        assert self.pod.log is not None
        seen = self.pod.log.read_text().count("trainer hangs:")
        while True:
            began = time.perf_counter()
            os.kill(victim, signal.SIGSTOP)
            try:
                beat = self.pod.beat()
            except PageError:
                break  # stopped inside a write, which is inside training
            if beat is not None and beat.phase == pb.RUNTIME_PHASE_RUNNING and not beat.validating:
                break
            os.kill(victim, signal.SIGCONT)
            time.sleep(0.05)
        log = self.pod.log
        until(lambda: log.read_text().count("trainer hangs:") > seen, "the hang", 0.002)
        return (time.perf_counter() - began) * 1e3, (3 * p99_s + 1.0) * 1e3

    def step_times(self, seconds: float = 3.0) -> list[float]:
        """Of steps that followed each other between two looks at the page."""
        times, before, end = [], self.pod.beat(), time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.0002)
            try:
                now = self.pod.beat()
            except PageError:  # the writer lost its processor inside a write
                now = None
            if now is not None and before is not None and now.step == before.step + 1:
                times.append((now.beat_ns - before.beat_ns) / 1e9)
            before = now
        return times


def floor() -> float:
    """Milliseconds from SIGKILL to the end of wait()."""
    code = "import torch, time; print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        began = time.perf_counter()
        process.kill()
        process.wait()
        return (time.perf_counter() - began) * 1e3


def measure(name: str, bench: Bench, rounds: int) -> None:
    series: dict[str, list[float]] = {}
    for _ in range(rounds):
        for part, value in bench.kill().items():
            series.setdefault(part, []).append(value)
    print(name)
    for part, values in series.items():
        print(row(part, values))


def hang(entrypoint: str) -> tuple[float, float]:
    with ExitStack() as stack:
        return Bench(stack, entrypoint, spare=False).hang()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hangs", type=int, default=5)
    parser.add_argument("--cold", type=int, default=3)
    parser.add_argument("--entrypoint", default="tiny:build")
    arguments = parser.parse_args()
    print(machine())
    with ExitStack() as stack:
        bench = Bench(stack, arguments.entrypoint, spare=True)
        measure("SIGKILL with a spare", bench, arguments.rounds)
    print(row("floor: SIGKILL to wait()", [floor() for _ in range(max(1, arguments.rounds // 2))]))
    if arguments.hangs:
        noticed, goals = zip(*(hang(arguments.entrypoint) for _ in range(arguments.hangs)), strict=True)
        print(row("hang noticed", noticed))
        print(row("goal: 3 p99 + 1 s", goals))
    if arguments.cold:
        with ExitStack() as stack:
            measure("SIGKILL without a spare", Bench(stack, arguments.entrypoint, spare=False), arguments.cold)


if __name__ == "__main__":
    main()
