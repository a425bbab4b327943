"""Faults of the checkpoint volume while a real trainer runs (fault row 8): full, EIO, read-only, slow, by a real shim.

Training never stops for it, what was saved before stays whole, and the end has the bits of a run on a sound disk.
"""

import errno
import random
import time
from collections import Counter
from pathlib import Path

from esper_leyline.exitcodes import ExitCode
from esper_runtime.checkpoint import LoadedGeneration

from tests.faults.spawned import END_S, STEPS, configured, spawned, undisturbed
from tests.support.shim import Shim, build
from tests.support.trainers import same_bits

FAULTS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "EIO": (("write", errno.EIO, 0),),
    "EIO at fsync": (("sync", errno.EIO, 0),),
    "read-only": (("open", errno.EROFS, 0), ("name", errno.EROFS, 0), ("write", errno.EROFS, 0)),
    "full": (("write", errno.ENOSPC, 0), ("size", errno.ENOSPC, 0)),
    "slow": (("sync", 0, 50), ("write", 0, 5)),
}
HOLD_S = (0.01, 0.15)


class Volumes:
    name = "volumes"
    goal = 500

    def __init__(self) -> None:
        self._expected: LoadedGeneration | None = None

    def shoot(self, number: int, directory: Path) -> "Counter[str]":
        dice = random.Random(number)
        if self._expected is None:
            self._expected = undisturbed(directory / "undisturbed")
        pod = configured(directory / "disturbed")
        shim = Shim(build(directory), pod.root / "checkpoints", directory / "control")
        counts: Counter[str] = Counter()
        with spawned(pod, shim.environment) as process:
            while pod.heartbeat() is None or not pod.saved_step():
                assert process.poll() is None, f"ended with {process.returncode} before its first checkpoint"
                time.sleep(0.002)
            # What ends on a broken volume ends with another code, and rightly: the model could not be exported.
            while process.poll() is None and (beat := pod.heartbeat()) is not None and beat.step < STEPS * 3 // 4:
                name = dice.choice(sorted(FAULTS))
                shim.inject(*FAULTS[name])
                time.sleep(dice.uniform(*HOLD_S))
                shim.inject()
                time.sleep(dice.uniform(*HOLD_S))
                if process.poll() is None:
                    counts["faults"] += 1
                    counts[name] += 1
            said = process.communicate(timeout=END_S)[1]
        assert process.returncode == ExitCode.COMPLETE, f"ended with {process.returncode}: {said[-1500:]}"
        kept = pod.newest()
        assert kept.corrupt == (), f"damaged by a failing volume: {kept.corrupt}"
        same_bits(kept, self._expected)
        return counts
