"""Many runs under one broadcast, with the time of each leg to each run; `tests/bench/bench_many.py` prints the table.

Time starts when the API server has answered the write of ConfigMap esper-emergency. A signal counts as heard when the
pod first has it by that leg; an answer when a watch of the runs shows the status that has it.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from esper_leyline import labels
from esper_operator.kube.api import RUNS, Object
from esper_operator.kube.informer import Informer

from tests.apiserver.operators import Cluster, run_manifest
from tests.support.waiting import until

FOREVER = 1_000_000
TEAM = {"fleet": "many"}
START_S = 600.0
"""For the Job controller, which makes some pods a second here."""
HALT_S = 120.0
SETTLE_S = 3.0
"""After the last answer: Events, and touches of pods that were slow."""


@dataclass(frozen=True, kw_only=True)
class Halted:
    """Milliseconds per run, and what was written for all of them."""

    redis: list[float]
    configmap: list[float]
    """Only of pods that were touched: who has answered by Redis is not."""
    answered: list[float]
    """The trainer's answer is in the status."""
    complete: list[float]
    """And those of the sidecars."""
    told: list[float]
    """status.halt.milliseconds: from the signal to the last answer, by the operator's own clock."""
    writes: Counter[str]
    cpu_s: dict[str, float]
    """By program: what it would take on a machine that does nothing else, however busy this one is."""


class Fleet:
    def __init__(self, place: Cluster, count: int) -> None:
        self.place = place
        self.names = [f"many-{number:03}" for number in range(count)]
        self._phases: dict[str, str] = {}
        self._answered: dict[str, float] = {}
        self._complete: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._watch = Informer(
            place.api, RUNS, project=self._see, on_change=lambda _: None, namespaces=(place.namespace,), selector=""
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Makes the runs and waits until all train."""
        self._task = asyncio.create_task(self._watch.run())
        await asyncio.to_thread(self._create)
        await self._all(lambda name: self._phases.get(name) == "Running", START_S, "train")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def halt(self, mode: str = "Freeze", *, patches: bool = False) -> Halted:
        """One broadcast, or a patch of each run; returns when every answer of every run is in its status."""
        place, arrivals = self.place, self.place.node.arrivals
        mark = await asyncio.to_thread(place.audit_mark)
        for known in (arrivals, self._answered, self._complete):
            known.clear()
        used = self._cpu_s()
        if patches:
            began = time.monotonic()
            await asyncio.to_thread(self._patch, mode)
        else:
            await asyncio.to_thread(self._broadcast, mode)
            began = time.monotonic()
        await self._all(lambda name: name in self._complete, HALT_S, "have answered")
        cpu_s = {program: seconds - used[program] for program, seconds in self._cpu_s().items()}
        await asyncio.sleep(SETTLE_S)

        def of(times: dict[str, float]) -> list[float]:
            return [(at - began) * 1000 for at in times.values()]

        return Halted(
            redis=of({run: at for (run, leg), at in arrivals.items() if leg == "redis"}),
            configmap=of({run: at for (run, leg), at in arrivals.items() if leg == "configmap"}),
            answered=of(self._answered),
            complete=of(self._complete),
            told=list(self._told.values()),
            writes=await asyncio.to_thread(place.write_counts, mark),
            cpu_s=cpu_s,
        )

    async def lift(self, *, patches: bool = False) -> None:
        if patches:
            await asyncio.to_thread(self._patch, "None")
        else:
            await asyncio.to_thread(self._unsay)
        await self._all(lambda name: self._phases.get(name) == "Running", HALT_S, "train again")

    def _patch(self, mode: str) -> None:
        for name in self.names:
            self.place.set_spec(name, emergencyStop=mode)

    def _unsay(self) -> None:
        path = f"/api/v1/namespaces/{self.place.namespace}/configmaps/{labels.EMERGENCY_CONFIG_MAP}"
        self.place.plane.request("DELETE", path)

    def _cpu_s(self) -> dict[str, float]:
        programs = {name: process.pid for name, process in self.place.plane.processes.items()}
        programs |= {"operator": self.place.operator.process.pid, "simulated pods": os.getpid()}
        times = {name: psutil.Process(pid).cpu_times() for name, pid in programs.items()}
        return {name: time.user + time.system for name, time in times.items()}

    def _create(self) -> None:
        for name in self.names:
            self.place.node.plan(name, total_steps=FOREVER)
            manifest = run_manifest(name)
            manifest["metadata"]["labels"] = TEAM
            reply = self.place.plane.create(self.place.path(), manifest)
            assert reply.ok, reply.message

    def _broadcast(self, mode: str) -> None:
        text = f"mode: {mode}\nselector: fleet=many\nreason: a fire drill\n"
        manifest = {"metadata": {"name": labels.EMERGENCY_CONFIG_MAP}, "data": {"drill": text}}
        reply = self.place.plane.create(f"/api/v1/namespaces/{self.place.namespace}/configmaps", manifest)
        assert reply.ok, reply.message

    def _see(self, raw: Object) -> str:
        name, status = raw["metadata"]["name"], raw.get("status") or {}
        phase = self._phases[name] = status.get("phase", "")
        halt = status.get("halt") or {}
        if phase == "Halted" and halt.get("acknowledged") == 1:
            self._answered.setdefault(name, time.monotonic())
            self._told[name] = float(halt["milliseconds"])
            if not halt.get("missing"):
                self._complete.setdefault(name, time.monotonic())
        return name

    async def _all(self, reached: Callable[[str], bool], timeout_s: float, what: str) -> None:
        def look() -> bool:
            self.place.node.assert_well()
            return all(map(reached, self.names))

        await until(look, timeout_s, f"{len(self.names)} runs {what}; phases: {Counter(self._phases.values())}")
