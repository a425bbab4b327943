"""Epoch boundary against real kasmina and tamiyo processes: what the trainer is held, by part.

.venv/bin/python tests/bench/bench_boundary.py [--rounds 1000]
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.tolaria.handshake import Boundary, BoundaryResult

from tests.support.sidecars import Sidecars


def measure(boundary: Boundary, rounds: int, pause_s: float) -> list[BoundaryResult]:
    results = []
    for epoch in range(rounds):
        # A trainer works between boundaries; a pause lets every cache and thread go cold as it would there.
        time.sleep(pause_s)
        packet = SystemStatePacket(
            current_epoch=epoch, global_step=epoch * 10 + 1, training_loss=1.0, validation_loss=1.0 / (epoch + 1)
        )
        results.append(boundary.exchange(packet))
    return results


def report(name: str, values: list[float]) -> None:
    values.sort()
    p99 = values[min(len(values) - 1, round(0.99 * len(values)))]
    print(
        f"{name:28} n={len(values):5}  p50 {statistics.median(values):6.2f}  p99 {p99:6.2f}  max {values[-1]:6.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--pause-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, commit {commit.strip()}")
    with tempfile.TemporaryDirectory() as directory:
        sidecars = Sidecars(Path(directory))
        try:
            for name in ("kasmina", "tamiyo"):
                sidecars.start(name)
            boundary = Boundary(sidecars.run_dir, run_uid=sidecars.run_uid, attempt=1)
            results = measure(boundary, arguments.rounds, arguments.pause_ms / 1000.0)
            dead = Path(directory) / "nobody"
            dead.mkdir()
            absent = measure(Boundary(dead, run_uid=sidecars.run_uid, attempt=1), arguments.rounds, 0.0)
        finally:
            sidecars.stop()
    report("held (total)", [r.timings.total_ms for r in results])
    for part in ("open_ms", "evaluate_ms", "submit_ms"):
        report(part, [value for r in results if (value := getattr(r.timings, part)) is not None])
    report("held, no sidecar there", [r.timings.total_ms for r in absent])
    answered = sum(r.answered for r in results)
    commands = sum(r.command is not None for r in results)
    print(f"answered within the soft deadline: {answered}/{len(results)}; commands: {commands}")


if __name__ == "__main__":
    main()
