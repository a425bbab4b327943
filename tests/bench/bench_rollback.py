"""P5: rollback inside the process, against memmove of the same bytes.

.venv/bin/python tests/bench/bench_rollback.py [--rounds 40] [--seconds 10] [--only 3072] [--sizes 1,16,256]

Esper's side is what happens to a training run between the detection of a bad step and the next step: the snapshot is
verified (128-bit digest over every byte) while it is copied into the live tensors, random states, loss window and
loader position are put back, the fact goes durably into the run's log, and recovery and transitions into the journal.
The floor is a copy of as many bytes between two warm buffers. "copy and verify" is the snapshot's part alone. The whole
is judged against the floor from 64 MiB on; below, the log's fdatasync (P8) is most of it.

Then the same for states of any size (MiB of parameters and moments), where they fit, with what every further MiB costs.
"""

import argparse
import ctypes
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from esper_leyline.reasons import RunReason
from esper_runtime.tolaria.rollback import Trouble

from tests.bench.bench_overhead import CODE
from tests.bench.bench_snapshot import SHARED, trained
from tests.bench.common import machine, ratio, row, section, timed
from tests.bench.sizes import MIB, SIZES, Point, fits, rounds_within, sizes_of, tell

MODELS = ("64", "digits", "3072")
RATIO_LIMIT, P99_LIMIT_MS = 1.5, 500.0
JUDGED_BYTES = 64 * MIB


def measure(directory: Path, config: dict[str, Any], rounds: int, seconds: float, **options: int) -> dict[str, Point]:
    """By name. `options`: of `trained`."""
    parts, state = trained(directory, config, **options)
    snapshots = parts.memory.snapshots
    assert snapshots is not None
    target = next(held for held in snapshots.held() if held.good)
    targets = state.restore_targets()
    size = sum(tensor.nbytes for tensor in targets.values())
    source, copy = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
    ctypes.memmove(copy, source, size)
    floor: list[float] = []
    copied: list[float] = []
    whole: list[float] = []
    for _ in rounds_within(seconds, most=rounds):
        floor.append(timed(lambda: ctypes.memmove(copy, source, size)) * 1e3)
        copied.append(timed(lambda: snapshots.restore(target, targets)) * 1e3)
        trouble = trouble_after(target.step)
        whole.append(timed(lambda trouble=trouble: parts.rollbacks.roll_back(state, trouble)) * 1e3)  # type: ignore[misc]
        assert state.step == target.step
    return {"copy and verify": Point(size / MIB, copied, floor), "whole rollback": Point(size / MIB, whole, floor)}


def trouble_after(step: int) -> Trouble:
    now = time.monotonic_ns()
    return Trouble(
        cause=RunReason.NON_FINITE_LOSS,
        message="bench",
        at_step=step + 2,
        first_suspect=step + 1,
        poisoned=(),
        began_ns=now,
        detected_ns=now,
    )


def report(found: dict[str, Point]) -> None:
    floor, size = found["whole rollback"].floor, found["whole rollback"].mib * MIB
    print(row("memmove", floor))
    for name, point in found.items():
        whole = name == "whole rollback"
        print(row(name, point.ours, goal="P5" if whole else "", limit=P99_LIMIT_MS if whole else None))
    for name, point in found.items():
        judged = name != "whole rollback" or size >= JUDGED_BYTES
        print(ratio(f"{name} / memmove", point.ours, floor, goal="P5", limit=RATIO_LIMIT if judged else None))


def in_a_pod(work: Callable[[Path], dict[str, Point]]) -> dict[str, Point]:
    """Memory in a memory volume, the log on a disk."""
    with tempfile.TemporaryDirectory(dir=SHARED) as memory, tempfile.TemporaryDirectory() as disk:
        (Path(memory) / "checkpoints").symlink_to(disk)
        return work(Path(memory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10.0, help="at most so long per model or size")
    parser.add_argument("--only", default="", help="a model: digits, 64, 3072; or sizes")
    parser.add_argument("--sizes", default=SIZES, help="MiB of state, separated by commas")
    arguments = parser.parse_args()
    sys.path.insert(0, str(CODE))
    print(f"{machine()}, torch {torch.__version__}")
    rounds, seconds = arguments.rounds, arguments.seconds
    for model in MODELS:
        if arguments.only in ("", model):
            found = in_a_pod(lambda place, model=model: measure(place, {"model": model}, rounds, seconds))  # type: ignore[misc]
            section(f"{model}: {found['whole rollback'].mib:.1f} MiB of parameters, moments and buffers")
            report(found)
    points: dict[str, list[Point]] = defaultdict(list)
    for mib in sizes_of(arguments.sizes) if arguments.only in ("", "sizes") else ():
        # Live: state, gradients and the floor's two buffers; in the memory volume: two slots.
        if not fits(mib, memory=7, shared=(SHARED, 3)):
            continue
        config = {"model": "state", "state_bytes": mib * MIB}
        found = in_a_pod(lambda place, config=config: measure(place, config, rounds, seconds, every=1, slots=2))  # type: ignore[misc]
        section(f"{mib} MiB")
        report(found)
        for name, point in found.items():
            points[name].append(point)
    for name, series in points.items():
        tell(f"{name} against memmove", series, goal="P5")


if __name__ == "__main__":
    main()
