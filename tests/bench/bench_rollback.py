"""P5: rollback inside the process, against memmove of the same bytes.

.venv/bin/python tests/bench/bench_rollback.py [--rounds 40]

Esper's side is what happens to a training run between the detection of a bad step and the next step: the snapshot is
verified (128-bit digest over every byte) while it is copied into the live tensors, random states, loss window and
loader position are put back, the fact goes durably into the run's log, and recovery and transitions into the journal.
The floor is a copy of as many bytes between two warm buffers. "copy and verify" is the snapshot's part alone.
"""

import argparse
import ctypes
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from esper_leyline.reasons import RunReason
from esper_runtime.tolaria.rollback import Trouble

from tests.bench.bench_overhead import CODE
from tests.bench.common import machine, ratio, row, timed
from tests.support.trainers import PAUSED, Pod, Turns

MODELS = ("64", "digits", "3072")


def measure(directory: Path, model: str, rounds: int) -> None:
    pod = Pod(directory)
    pod.configure(entrypoint="benchload:build", checkpoint={}, rollback={"maxRollbacks": 100_000})
    pod.document["config"] = {"model": model, "threads": 1}
    pod.write_config()
    parts, state = pod.assemble()
    assert Turns(parts, state).run(12) is PAUSED  # a snapshot of step 10 that step 11 has shown to be good
    snapshots = parts.memory.snapshots
    assert snapshots is not None
    targets = state.restore_targets()
    size = sum(tensor.nbytes for tensor in targets.values())
    source, target = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
    floor, copied, whole = [], [], []
    for _ in range(rounds):
        floor.append(timed(lambda: ctypes.memmove(target, source, size)) * 1e3)
        held = next(held for held in snapshots.held() if held.step == 10)
        copied.append(timed(lambda held=held: snapshots.restore(held, targets)) * 1e3)  # type: ignore[misc]
        now = time.monotonic_ns()
        trouble = Trouble(
            cause=RunReason.NON_FINITE_LOSS,
            message="bench",
            at_step=12,
            first_suspect=12,
            poisoned=(),
            began_ns=now,
            detected_ns=now,
        )
        whole.append(timed(lambda trouble=trouble: parts.rollbacks.roll_back(state, trouble)) * 1e3)  # type: ignore[misc]
        assert state.step == 10
    print(f"{model}: {size / 2**20:.1f} MiB of parameters, moments and buffers")
    for name, values in (("memmove", floor), ("copy and verify", copied), ("whole rollback", whole)):
        print(row(name, values))
    print(ratio("copy and verify / memmove", copied, floor))
    print(ratio("whole rollback / memmove", whole, floor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    sys.path.insert(0, str(CODE))
    print(f"{machine()}, torch {torch.__version__}")
    for model in MODELS:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory, tempfile.TemporaryDirectory() as disk:
            pod = Path(memory)
            (pod / "checkpoints").symlink_to(disk)  # the log is synced to a disk, as in a pod
            measure(pod, model, arguments.rounds)


if __name__ == "__main__":
    main()
