"""P12: what the operator writes to a real API server in each stage of a run's life, from the audit log.

Changes are entries of status.history. A status write without one says that the pods are ready, that a rank has
acknowledged, that an edit or the next attempt's number is seen, or progress (once in 10 s).

KUBE_ASSETS=... .venv/bin/python tests/bench/bench_api_writes.py [--steady 60] [--rest 60]
"""

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_operator.api import crd

from tests.apiserver.operators import cluster
from tests.apiserver.writes import Life, Stage
from tests.bench.common import machine
from tests.support.controlplane import running


async def measure(steady_s: float, rest_s: float) -> list[Stage]:
    with tempfile.TemporaryDirectory() as directory, running(Path(directory) / "plane", controllers=True) as plane:
        plane.install_crd(crd.manifest())
        async with cluster(plane, Path(directory), step_s=0.5) as place:
            await place.leading_operator()
            return await Life(place).tell(steady_s=steady_s, frozen_s=rest_s, rest_s=rest_s)


def row(name: str, seconds: float, changes: int, statuses: int, events: int, objects: int, conflicts: int) -> str:
    total = statuses + events + objects
    return f"{name:16}{seconds:8.0f}{changes:9}{statuses:9}{events:8}{objects:9}{total:7}{conflicts:11}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steady", type=float, default=60.0, metavar="S", help="seconds of steady training")
    parser.add_argument("--rest", type=float, default=60.0, metavar="S", help="seconds frozen, halted and finished")
    arguments = parser.parse_args()
    print(machine())
    stages = asyncio.run(measure(arguments.steady, arguments.rest))
    print(
        f"{'stage':16}{'seconds':>8}{'changes':>9}{'status':>9}{'Events':>8}{'objects':>9}{'total':>7}{'conflicts':>11}"
    )
    for s in stages:
        print(row(s.name, s.seconds, s.changes, s.statuses, s.events, s.objects, s.conflicts))
    total: Counter[str] = sum((s.writes for s in stages), Counter())
    for kind, count in sorted(total.items()):
        print(f"  {count:4} {kind}")


if __name__ == "__main__":
    main()
