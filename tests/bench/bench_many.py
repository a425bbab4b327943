"""One broadcast over n runs, or a patch of each: how soon every pod has the signal by each leg, and when the status has
all answers.

KUBE_ASSETS=... .venv/bin/python tests/bench/bench_many.py [--runs 20 60 200] [--rounds 3] [--patches]

A real API server, a real Redis, simulated pods, which report every second; all of them, the operator too, share this
machine. Time starts when the write of ConfigMap esper-emergency is answered, or before the first patch. The floor is
what the same API server takes for the same writes when nobody else asks anything of it; the operator is not there any
more then.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_leyline import labels
from esper_operator.api import crd
from esper_operator.kube.api import CONFIG_MAPS, PODS, RUNS
from esper_operator.kube.client import MAX_WRITES_IN_FLIGHT

from tests.apiserver.fleet import Fleet, Halted
from tests.apiserver.operators import Cluster, cluster
from tests.bench.common import machine, quantile, row, section
from tests.support.controlplane import running

STEP_S = 1.0
PODS_OPTIONS = {"redis_timeout_s": 5.0, "redis_block_s": 10.0}
"""All pods are one process here: readers that ask less often, and are more patient, than those of real ones."""
SERIES = (
    ("signal by Redis", "redis"),
    ("signal by ConfigMap", "configmap"),
    ("trainers' answers in status", "answered"),
    ("all answers in status", "complete"),
    ("status.halt.milliseconds", "told"),
)


async def measure(count: int, rounds: int, patches: bool) -> None:
    with tempfile.TemporaryDirectory() as directory, running(Path(directory) / "plane", controllers=True) as plane:
        plane.install_crd(crd.manifest())
        async with cluster(plane, Path(directory), step_s=STEP_S, **PODS_OPTIONS) as place:
            await place.leading_operator(log_level="INFO")
            fleet = Fleet(place, count)
            found: list[Halted] = []
            try:
                await fleet.start()
                for _ in range(rounds):
                    found.append(await fleet.halt(patches=patches))
                    await fleet.lift(patches=patches)
                tell(f"{count} runs, {'a patch of each' if patches else 'one broadcast'}, {rounds} times", found)
                place.operator.kill()
                await place.node.stop()
                await floor(place, fleet)
            finally:
                await fleet.close()


def tell(title: str, found: Sequence[Halted]) -> None:
    section(title)
    for what, name in SERIES:
        values = [value for halted in found for value in getattr(halted, name)]
        if values:
            print(f"{row(what, values)}  p99 {quantile(values, 0.99):.0f}")
    for number, halted in enumerate(found, 1):
        written = ", ".join(f"{n} {kind}" for kind, n in sorted(halted.writes.items()))
        print(f"  writes of time {number}: {written}", flush=True)
        used = ", ".join(f"{program} {seconds:.1f}" for program, seconds in halted.cpu_s.items())
        print(f"  CPU seconds until the last answer: {used}", flush=True)


async def floor(place: Cluster, fleet: Fleet) -> None:
    """Writes as the operator's own, as many at a time."""
    api, namespace = place.api, place.namespace
    number = itertools.count()
    names = [labels.emergency_config_map_name(name) for name in fleet.names]
    signal = (await api.get(CONFIG_MAPS, names[0], namespace=namespace))["data"]["signal"]
    await rate(
        "ConfigMap patches",
        names,
        lambda name: api.patch(
            CONFIG_MAPS, name, namespace=namespace, body={"data": {"signal": f"{signal}{next(number)}"}}
        ),
    )
    await rate(
        "pod touches",
        [pod for name in fleet.names for pod in place.node.pod_names(name)[-1:]],
        lambda name: api.patch(
            PODS, name, namespace=namespace, body={"metadata": {"annotations": {"bench": str(next(number))}}}
        ),
    )
    manifests = []
    for name in fleet.names:
        run = await api.get(RUNS, name, namespace=namespace)
        run["status"]["progress"]["step"] += 1
        kept = {key: run[key] for key in ("apiVersion", "kind", "status")}
        manifests.append(kept | {"metadata": {"namespace": namespace, "name": name}})
    await rate("status applies", manifests, lambda manifest: api.apply_status(RUNS, manifest))


async def rate(title: str, items: Sequence[Any], write: Callable[[Any], Awaitable[object]]) -> None:
    """RestApi lets as many in at a time as the operator's does."""
    waits = asyncio.Semaphore(MAX_WRITES_IN_FLIGHT)

    async def one(item: Any) -> None:
        async with waits:
            await write(item)

    began = time.monotonic()
    await asyncio.gather(*map(one, items))
    took_s = time.monotonic() - began
    print(
        f"  floor: {len(items):4} {title:18} {took_s * 1000:7.0f} ms, {len(items) / took_s:5.0f} a second", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[20, 60, 200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patches", action="store_true", help="of each run, instead of a broadcast")
    arguments = parser.parse_args()
    print(machine())
    for count in arguments.runs:
        asyncio.run(measure(count, arguments.rounds, arguments.patches))


if __name__ == "__main__":
    main()
