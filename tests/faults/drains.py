"""SIGTERM at random instants, with a grace of 5 s and 30 s (fault row 6): a checkpoint inside it, or the last one.

The process ends with its own exit code for it, and a new pod, whose memory is empty, ends with the bits of a run that
nothing happened to.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

from esper_leyline.exitcodes import ExitCode
from esper_runtime.checkpoint import LoadedGeneration

from tests.faults.kills import EPOCHS, _be_trainer, _never, configured, live
from tests.support.trainers import Pod, same_bits

GRACES_S = (5.0, 30.0)
MAX_DRAINS = 12
STEPS = 16 * EPOCHS


class Drains:
    name = "drains"
    goal = 300

    def __init__(self) -> None:
        self._expected: LoadedGeneration | None = None

    def shoot(self, number: int, directory: Path) -> "Counter[str]":
        dice = random.Random(number)
        if self._expected is None:
            undisturbed = configured(directory / "undisturbed", "adamw")
            assert live(undisturbed, _never) == ExitCode.COMPLETE
            self._expected = undisturbed.newest()
        pod = configured(directory / "drained", "adamw")
        counts: Counter[str] = Counter()
        for incarnation in range(1, MAX_DRAINS + 1):
            pod.incarnation = incarnation
            grace_s = dice.choice(GRACES_S)
            more = dice.randrange(1, STEPS // 4) if incarnation < MAX_DRAINS else STEPS
            status, took_s = drain(pod, pod.saved_step() + more, grace_s)
            if status == ExitCode.COMPLETE:
                break
            # Before it listens for it, SIGTERM ends a process as it always does.
            assert status in (ExitCode.DRAINED, -signal.SIGTERM), f"incarnation {incarnation} ended with {status}"
            counts["faults"] += 1
            counts[f"grace {grace_s:g} s"] += 1
            assert took_s < grace_s
            for name in ("shm", "run"):
                shutil.rmtree(pod.root / name)
                (pod.root / name).mkdir()
        else:
            raise AssertionError(f"not complete after {MAX_DRAINS} pods")
        same_bits(pod.newest(), self._expected)
        return counts


def drain(pod: Pod, step: int, grace_s: float) -> tuple[int, float]:
    """SIGTERM at that step or soon after: (exit code or minus the signal, seconds from it to the end)."""
    child = os.fork()
    if child == 0:
        _be_trainer(pod)
    asked = 0.0
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        now = time.monotonic()
        if not asked and (beat := pod.heartbeat()) is not None and beat.step >= step:
            os.kill(child, signal.SIGTERM)
            asked = now
        elif asked and now - asked > grace_s:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"not over {grace_s} s after SIGTERM")
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(found[1]), time.monotonic() - asked if asked else 0.0
