"""Forks processes that take snapshots without pause, for tests that kill them at any instant.

Arguments: directory, slots. Reads one line per round from standard input (the next step to begin with), forks, answers
with the child's pid.
Every tensor of the state of step n holds n everywhere, so a mixture of two states would show.
"""

import os
import sys
from pathlib import Path

import torch
from esper_runtime.tolaria import slot
from esper_runtime.tolaria.snapshot import Snapshots

ELEMENTS = 60_000


def state(step: int) -> dict[str, torch.Tensor]:
    return {
        "parameters": torch.full((ELEMENTS,), float(step)),
        "moments": torch.full((2 * ELEMENTS,), float(step)),
        "count": torch.tensor(float(step)),
    }


def write_for_ever(directory: Path, step: int, slots: int) -> None:
    snapshots = Snapshots(directory, identity="kill", slots=slots)
    while True:
        slot.WORTH_BYTES = step % 2 << 60  # every other one is hashed in a thread of its own
        snapshots.promote(before_step=step)
        snapshots.capture(
            step=step, tensors=state(step), blobs={"rng": str(step).encode() * 50}, meta={"n": step}, good=False
        )
        step += 1


def main() -> None:
    directory, slots = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            write_for_ever(directory, int(line), slots)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main()
