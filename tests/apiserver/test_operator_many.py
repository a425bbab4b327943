"""One word for many runs: by labels through the ConfigMap, said by `esper halt`, on a real API server.

ESPER_MANY_RUNS is the number of runs of the large broadcast (12; 200 is what is promised, and takes its time);
`tests/bench/bench_many.py` has the figures.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import time

import pytest

from tests.apiserver.operators import Cluster, run_manifest
from tests.support.waiting import until

pytestmark = [pytest.mark.apiserver, pytest.mark.slow, pytest.mark.timeout(900)]
START_S = 600.0
"""For the Job controller, which makes some pods a second here."""
MANY = int(os.environ.get("ESPER_MANY_RUNS", "12"))


@pytest.fixture
def step_s() -> float:
    return 1.0


async def esper(colony: Cluster, *arguments: str) -> "subprocess.CompletedProcess[str]":
    where = ("-n", colony.namespace, "--kubeconfig", str(colony.plane.kubeconfig))
    command = [sys.executable, "-m", "esper_runtime.cli.main", *arguments, *where]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False, timeout=120)


def labelled(colony: Cluster, name: str, **team: str) -> None:
    colony.node.plan(name, total_steps=100_000)
    manifest = run_manifest(name)
    manifest["metadata"]["labels"] = team
    reply = colony.plane.create(colony.path(), manifest)
    assert reply.ok, reply.message


@pytest.mark.asyncio(loop_scope="module")
async def test_a_halt_by_labels_stops_those_and_no_others_until_it_is_lifted(colony: Cluster) -> None:
    for name, team in (("one", "vision"), ("two", "vision"), ("three", "speech")):
        labelled(colony, name, team=team)
    for name in ("one", "two", "three"):
        await colony.phase(name, "Running")
    here = ("--operator-namespace", colony.namespace)
    dry = await esper(colony, "halt", "-l", "team=vision", "--dry-run", *here)
    assert dry.returncode == 0, dry.stderr
    assert [line.split()[2].split("/")[1] for line in dry.stderr.splitlines()[:2]] == ["one", "two"]
    assert {colony.status(name)["phase"] for name in ("one", "two", "three")} == {"Running"}

    halted = await esper(colony, "halt", "-l", "team=vision", "--mode", "Freeze", "--reason", "a fire drill", *here)
    assert halted.returncode == 0, halted.stderr
    assert "2 halted after" in halted.stderr
    for name in ("one", "two"):
        halt = colony.status(name)["halt"]
        assert (halt["source"], halt["acknowledged"], halt["expected"]) == ("Broadcast", 1, 1)
        await colony.sees(name, lambda status: status["halt"].get("missing", []) == [], "everybody has answered")
        assert "a fire drill" in colony.condition(name, "Halted")["message"]
    assert colony.status("three")["phase"] == "Running"

    labelled(colony, "late", team="vision")
    await colony.phase("late", "Halted")
    broadcast = next(line.split()[1].rstrip(":") for line in halted.stderr.splitlines() if line.startswith("broadcast"))
    lifted = await esper(colony, "resume", "--broadcast", broadcast, "--operator-namespace", colony.namespace)
    assert lifted.returncode == 0, lifted.stderr
    for name in ("one", "two", "late"):
        await colony.phase(name, "Running")
    again = await esper(colony, "resume", "--broadcast", broadcast, "--operator-namespace", colony.namespace)
    assert again.returncode == 1
    assert f"there is no broadcast '{broadcast}'" in again.stderr


async def test_one_broadcast_halts_every_run_there_is(place: Cluster) -> None:
    await place.leading_operator()
    names = [f"many-{number}" for number in range(MANY)]
    for name in names:
        labelled(place, name, fleet="many")

    def phases() -> set[str]:
        found = {item["metadata"]["name"]: item.get("status", {}).get("phase") for item in place.items(place.path())}
        return {found[name] for name in names}

    await until(lambda: phases() == {"Running"}, START_S, f"{MANY} runs train")
    here = ("--operator-namespace", place.namespace)
    began = time.monotonic()
    dry = await esper(place, "halt", "-l", "fleet=many", "--dry-run", *here)
    dry_s = time.monotonic() - began
    assert dry.returncode == 0, dry.stderr
    assert dry.stderr.count("would stop") == MANY
    began = time.monotonic()
    halted = await esper(place, "halt", "-l", "fleet=many", "--mode", "Freeze", "--timeout", "60", *here)
    took_s = time.monotonic() - began
    assert halted.returncode == 0, halted.stderr
    halts = [place.status(name)["halt"] for name in names]
    assert {(halt["acknowledged"], halt["expected"], halt["source"]) for halt in halts} == {(1, 1, "Broadcast")}
    each = [halt["milliseconds"] for halt in halts]
    print(f"\n{MANY} runs halted by one broadcast: {took_s:.1f} s in all, dry run {dry_s:.1f} s; request -> "
          f"acknowledgement per run: median {statistics.median(each):.0f} ms, greatest {max(each)} ms")  # fmt: skip
    assert max(each) < 30_000
