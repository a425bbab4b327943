"""P14, as far as an API server without kubelets can show it: how soon the operator acts and tells.

KUBE_ASSETS=... .venv/bin/python tests/bench/bench_operator_latency.py [--runs 20]

All by the API server's own clock (its audit log): from the request that changed something to the operator's own. Pods
are simulated and answer at once, so what is measured is the operator and the API server, not a kubelet or a trainer.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_operator.api import crd

from tests.apiserver.operators import USER_AGENT, Cluster, cluster, moment
from tests.bench.common import machine, row
from tests.support.controlplane import running

Line = dict[str, Any]
FOREVER = 1_000_000


async def lives(place: Cluster, runs: int) -> list[str]:
    """Each run starts, freezes, goes on, is halted, and dies of a crash, one after the other; their names."""
    names = [f"run-{number:03}" for number in range(runs)]
    for name in names:
        place.create_run(name, steps=FOREVER, restart={"maxRestarts": 0})
        await place.phase(name, "Running")
        place.set_spec(name, emergencyStop="Freeze")
        await place.phase(name, "Halted")
        place.set_spec(name, emergencyStop="None")
        await place.phase(name, "Running")
        await place.node.crash(place.node.pod_names(name)[-1], 70)
        await place.phase(name, "Failed")
        place.delete_run(name)
    return names


async def measure(runs: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as directory, running(Path(directory) / "plane", controllers=True) as plane:
        plane.install_crd(crd.manifest())
        async with cluster(plane, Path(directory)) as place:
            await place.leading_operator()
            names = await lives(place, runs)
            lines = [line for line in plane.audit() if line.get("objectRef", {}).get("namespace") == place.namespace]
            return {title: [wait_ms(lines, name, *pair) for name in names] for title, pair in PAIRS.items()}


Test = Callable[[Line, str], bool]


def applied(line: Line, name: str) -> bool:
    return line["verb"] == "create" and is_on(line, "espertrainingruns", "", name)


def job_created(line: Line, name: str) -> bool:
    return line["verb"] == "create" and is_on(line, "jobs", "", f"{name}-a1") and by_operator(line)


def pod_running(line: Line, name: str) -> bool:
    return is_on(line, "pods", "status", f"{name}-a1-0") and line["userAgent"] == "test-node"


def told(line: Line, name: str) -> bool:
    return is_on(line, "espertrainingruns", "status", name) and by_operator(line)


def edited(line: Line, name: str) -> bool:
    return line["verb"] == "patch" and is_on(line, "espertrainingruns", "", name) and not by_operator(line)


def signal_sent(line: Line, name: str) -> bool:
    return line["verb"] == "patch" and is_on(line, "configmaps", "", f"{name}-emergency") and by_operator(line)


PAIRS: dict[str, tuple[Test, int, Test]] = {
    "apply -> Job created": (applied, 0, job_created),
    "pod Running -> status written": (pod_running, 0, told),
    "stop asked -> signal recorded": (edited, 0, signal_sent),
    "pod died -> status written": (pod_running, 1, told),
}
"""What begins it, its how-manieth occurrence, and the first thing after it that ends it."""


def wait_ms(lines: Iterable[Line], name: str, begins: Test, nth: int, ends: Test) -> float:
    """From the answer to the first request to the answer to the second."""
    began: datetime | None = None
    for line in sorted((line for line in lines if line["responseStatus"]["code"] < 300), key=answered):
        if began is not None and ends(line, name):
            return (answered(line) - began).total_seconds() * 1000
        if began is None and begins(line, name):
            nth -= 1
            began = answered(line) if nth < 0 else None
    raise AssertionError(f"{name}: the audit log does not have both")


def answered(line: Line) -> datetime:
    return moment(line["stageTimestamp"])


def is_on(line: Line, resource: str, subresource: str, name: str) -> bool:
    """On that object, or on one whose name goes on with a suffix of the Job controller's."""
    ref = line["objectRef"]
    same = ref.get("name") == name or (resource == "pods" and str(ref.get("name")).startswith(f"{name}-"))
    return ref["resource"] == resource and ref.get("subresource", "") == subresource and same


def by_operator(line: Line) -> bool:
    return bool(line["userAgent"] == USER_AGENT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    print(machine())
    for title, values in asyncio.run(measure(arguments.runs)).items():
        print(row(title, values))


if __name__ == "__main__":
    main()
