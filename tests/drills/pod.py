"""Harm to the processes of the pod, to its CPU, and to its disk."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from esper_leyline import labels

from tests.drills.drill import Drill, Notes
from tests.drills.stage import Stage

TIMES: Final = 3
STOPPED_S, GOING_S = 0.040, 0.004
HANG_TIMEOUT_S: Final = 5
FULL: Final = (("write", errno.ENOSPC, 0), ("size", errno.ENOSPC, 0))


@contextmanager
def sidecar_kill(stage: Stage, notes: Notes) -> Iterator[None]:
    """Weatherlight's worker is killed again and again."""
    for number in range(TIMES):
        worker = stage.laptop.only(f"esper_runtime.{labels.WEATHERLIGHT}.worker")
        os.kill(worker, signal.SIGKILL)
        stage.until(
            lambda old=worker: (
                (found := stage.laptop.pids(f"esper_runtime.{labels.WEATHERLIGHT}.worker")) and old not in found
            ),
            f"worker {number + 2}",
        )
    stage.train(10)
    notes.add(f"killed {TIMES} times; reports went on")
    yield


@contextmanager
def sidecar_hang(stage: Stage, notes: Notes) -> Iterator[None]:
    """Kasmina answers nobody, until its probe has it replaced."""
    before = stage.laptop.step()
    worker = stage.laptop.only(f"esper_runtime.{labels.KASMINA}.worker")
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
        stage.train(10)
        notes.add(f"training went on for {stage.laptop.step() - before} steps meanwhile")
    finally:
        if worker in stage.laptop.pids(f"esper_runtime.{labels.KASMINA}.worker"):
            os.kill(worker, signal.SIGCONT)


@contextmanager
def trainer_kill(stage: Stage, notes: Notes) -> Iterator[None]:
    """The trainer is killed again and again."""
    for number in range(1, TIMES + 1):
        os.kill(stage.laptop.trainer(), signal.SIGKILL)
        stage.until(lambda n=number: stage.laptop.status().get("restarts", {}).get("total") == n, f"restart {number}")
        stage.laptop.until_phase("Running")
        stage.train(5)
    recovery = stage.laptop.status()["lastRecovery"]
    notes.add(f"{TIMES} restarts in the pod; the last went back {recovery['fromStep'] - recovery['toStep']} steps")
    yield


@contextmanager
def hang(stage: Stage, notes: Notes) -> Iterator[None]:
    """The trainer stands still, and its supervisor has to see it."""
    began = time.monotonic()
    os.kill(stage.laptop.trainer(), signal.SIGSTOP)
    stage.until(lambda: stage.laptop.status().get("restarts", {}).get("total") == 1, "a restart")
    notes.add(f"replaced {time.monotonic() - began:.0f} s after it stopped (heartbeatTimeoutSeconds {HANG_TIMEOUT_S})")
    yield


class Throttle:
    """Lets a process run for a tenth of the time, as a busy node would."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="throttle")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            os.kill(self._pid, signal.SIGSTOP)
            self._ended.wait(STOPPED_S)
            os.kill(self._pid, signal.SIGCONT)
            self._ended.wait(GOING_S)


@contextmanager
def slow_boundaries(stage: Stage, notes: Notes) -> Iterator[None]:
    """Boundaries take longer than their 18 ms because the trainer gets no CPU."""
    with Throttle(stage.laptop.trainer()):
        yield
        slow = stage.value("esper:boundaries_slow:total")
        notes.add(f"{slow:.0f} boundaries over 18 ms, the last took {stage.value(_HOOK):.0f} ms")


_HOOK: Final = "esper_tolaria_epoch_hook_latency_ms"


@contextmanager
def disk_full(stage: Stage, notes: Notes) -> Iterator[None]:
    """Every write to the checkpoint volume fails for want of room."""
    stage.until(lambda: _saved(stage), "a first checkpoint")
    before = stage.laptop.step()
    stage.run.shim.inject(*FULL)
    try:
        yield
        stage.train(20)
        failures = stage.laptop.status()["checkpoint"].get("failures", 0)
        notes.add(f"training went on for {stage.laptop.step() - before} steps; {failures} saves failed")
    finally:
        notes.mend()
        stage.run.shim.inject()
    saved = _saved(stage)
    stage.until(lambda: _saved(stage) > saved, "a checkpoint after the fault")


def _saved(stage: Stage) -> int:
    """Step of the newest verified checkpoint; 0 without one."""
    return int(stage.laptop.status().get("checkpoint", {}).get("latestVerifiedStep") or 0)


DRILLS: Final = (
    Drill(
        name="sidecar-kill",
        harm=f"weatherlight is killed {TIMES} times",
        alerts=("WeatherlightRestarts",),
        fault=sidecar_kill,
    ),
    Drill(
        name="sidecar-hang",
        harm="kasmina is stopped (SIGSTOP)",
        alerts=("KasminaAuthorityLost",),
        fault=sidecar_hang,
    ),
    Drill(
        name="trainer-kill",
        harm=f"the trainer is killed {TIMES} times",
        alerts=("TolariaTrainerRestarts",),
        fault=trainer_kill,
    ),
    Drill(
        name="hang",
        harm="the trainer is stopped (SIGSTOP)",
        alerts=("TolariaTrainerHung",),
        fault=hang,
        spec={"health": {"heartbeatTimeoutSeconds": HANG_TIMEOUT_S}},
    ),
    Drill(
        name="boundary",
        harm="the trainer gets a tenth of its CPU, so boundaries take 25 ms and more",
        alerts=("TrainingLatencyHigh",),
        fault=slow_boundaries,
    ),
    Drill(
        name="disk-full",
        harm="the checkpoint volume is full",
        alerts=("TolariaCheckpointsFail",),
        fault=disk_full,
    ),
)
