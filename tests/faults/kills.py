"""SIGKILL at random instants of the real trainer (fault row 7), also inside snapshots and saves.

A run is killed again and again until it completes. Each start must go on from at most one interval before the last
step that was seen, and the end must have the bits of a run that nothing happened to. Trainers are forked from this
process, which has imported everything, so that a kill costs a fraction of a second; they are processes like any other.

Half of the kills come at a random instant of a whole life; the others lie in wait until the files show that a snapshot
or a save is being written, and strike a random moment later.
"""

import mmap
import os
import random
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from esper_leyline.exitcodes import ExitCode
from esper_leyline.v1 import report_pb2 as pb
from esper_runtime.checkpoint import LoadedGeneration
from esper_runtime.tolaria import trainer

from tests.support.trainers import CODE, Pod, same_bits

EPOCHS = 12
WIDTH = 16_384
"""Of the model's hidden layer: its snapshot takes about a millisecond, long enough to be hit."""
SNAPSHOT_EVERY = 3
MAX_KILLS = 60
END_S = 120.0
PLANS = ("time", "time", "snapshot", "save")
_HEAD = struct.Struct("<8sQ")
"""Of a snapshot's file: magic, generation; 0 while it is being written."""


class Kills:
    name = "kills"
    goal = 1_000

    def __init__(self) -> None:
        self._expected: dict[str, tuple[LoadedGeneration, float]] = {}
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)  # imports much more, once for all children

    def shoot(self, number: int, directory: Path) -> "Counter[str]":
        dice = random.Random(number)
        optimizer = dice.choice(("adamw", "sgd"))
        expected, life_s = self._undisturbed(optimizer, directory)
        pod = configured(directory / "killed", optimizer)
        counts: Counter[str] = Counter()
        for start in range(1, MAX_KILLS + 1):
            pod.trainer_start = start
            before, recoveries = _step(pod), len(_recoveries(pod))
            status = live(pod, _plan(dice, pod, life_s) if start < MAX_KILLS else _never)
            if status == ExitCode.COMPLETE:
                break
            assert status == -signal.SIGKILL, f"start {start} ended with {status}; its stderr is {pod.root}/stderr"
            counts["faults"] += 1
            counts[_where(pod)] += 1
            for recovery in _recoveries(pod)[recoveries:]:
                assert recovery.to_step >= before - SNAPSHOT_EVERY - 1, (
                    f"start {start} went on from step {recovery.to_step}, its predecessor was at {before}"
                )
                counts["recovered"] += 1
        else:
            raise AssertionError(f"not complete after {MAX_KILLS} starts")
        same_bits(pod.newest(), expected)
        return counts

    def _undisturbed(self, optimizer: str, directory: Path) -> tuple[LoadedGeneration, float]:
        """What it must end with, and the seconds of a whole life."""
        if optimizer not in self._expected:
            pod = configured(directory / "undisturbed", optimizer)
            began = time.monotonic()
            assert live(pod, _never) == ExitCode.COMPLETE
            self._expected[optimizer] = pod.newest(), time.monotonic() - began
        return self._expected[optimizer]


def _never(_: float) -> bool:
    return False


def _plan(dice: random.Random, pod: Pod, life_s: float) -> Callable[[float], bool]:
    """Tells, from the seconds lived, whether to kill now."""
    plan = dice.choice(PLANS)
    at_s = dice.uniform(0.0, life_s)
    if plan == "time":
        return lambda lived_s: lived_s >= at_s
    happening = _saving if plan == "save" else _snapping
    strike_s = dice.uniform(0.0, 0.002)
    began: list[float] = []

    def due(lived_s: float) -> bool:
        if not began and lived_s >= at_s / 2 and happening(pod):
            began.append(lived_s)
        return bool(began) and lived_s >= began[0] + strike_s

    return due


def configured(root: Path, optimizer: str) -> Pod:
    checkpoint: dict[str, Any] = {
        "everySteps": 8,
        "memory": {"everySteps": SNAPSHOT_EVERY},
        "retention": {"keepLatest": 2},
    }
    config = {"epochs": EPOCHS, "optimizer": optimizer, "losses": "", "width": WIDTH}
    # So wide a model has loss spikes of its own, which would be rolled back; here it is about kills.
    return Pod(root).configure(config=config, checkpoint=checkpoint, health={"lossSpike": {"action": "Ignore"}})


def live(pod: Pod, due: Callable[[float], bool]) -> int:
    """One trainer's life until `due` (told the seconds lived): its exit code, or minus the signal's number."""
    child = os.fork()
    if child == 0:
        _be_trainer(pod)
    began = time.monotonic()
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        lived_s = time.monotonic() - began
        if due(lived_s) or lived_s > END_S:
            os.kill(child, signal.SIGKILL)
            found = os.waitpid(child, 0)
            break
        time.sleep(0.0001)
    return os.waitstatus_to_exitcode(found[1])


def _be_trainer(pod: Pod) -> None:
    """In the child: never returns."""
    status = 111
    try:
        descriptor = os.open(pod.root / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(pod.environment())
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        sys.path.insert(0, str(CODE))
        status = trainer.main()
    finally:
        os._exit(status)


def _step(pod: Pod) -> int:
    beat = pod.heartbeat()
    return 0 if beat is None else beat.step


def _where(pod: Pod) -> str:
    """What the kill hit, as the files tell."""
    return "inside a save" if _saving(pod) else "inside a snapshot" if _snapping(pod) else "elsewhere"


def _saving(pod: Pod) -> bool:
    return any(pod.root.glob("checkpoints/*/a*/.tmp-*"))


def _snapping(pod: Pod) -> bool:
    return any(magic != bytes(8) and generation == 0 for magic, generation in _heads(pod))


def _heads(pod: Pod) -> Iterable[tuple[bytes, int]]:
    for path in (pod.root / "shm").glob("*"):
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size >= mmap.PAGESIZE:
                with mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ) as head:
                    yield _HEAD.unpack_from(head)


def _recoveries(pod: Pod) -> list[pb.Recovery]:
    """Of trainers that went on from their predecessor's state."""
    return [r for r in pod.events("recovery") if r.kind == pb.RECOVERY_KIND_IN_PLACE]
