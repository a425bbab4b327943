"""One broadcast over many runs, in virtual time, with an API server that takes its time for each write."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from esper_leyline.labels import EMERGENCY_CONFIG_MAP
from esper_leyline.oona import Outcome
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_operator.kube.api import CONFIG_MAPS, RUNS, KubeApi
from esper_operator.kube.client import MAX_WRITES_IN_FLIGHT, WRITE_RANKS
from esper_operator.kube.gate import Gate
from esper_operator.model import Run

from tests.support.operatorworld import NAMESPACE, Running, World
from tests.support.virtualtime import run_virtual
from tests.support.wrappedapi import WrappedApi

MANY = 20
"""More than there are workers, or places for writes."""
STEPS = 100_000
HOME = "esper-system"


class SlowApi(WrappedApi):
    """Lets writes in as RestApi does; each then takes `write_s`."""

    def __init__(self, api: KubeApi) -> None:
        super().__init__(api)
        self.write_s = 0.0
        self.writes: list[tuple[float, str, str]] = []
        """When each took effect, its verb and kind."""
        self._gate = Gate(MAX_WRITES_IN_FLIGHT)

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "get":
            return await self._api.get(*args, **kwargs)
        kind = args[0].kind
        async with self._gate.place(WRITE_RANKS.get(kind, 2)):
            await asyncio.sleep(self.write_s)
            answer = await getattr(self._api, name)(*args, **kwargs)
            self.writes.append((asyncio.get_running_loop().time(), name, kind))
            return answer


class Fleet:
    def __init__(self, world: World, api: SlowApi, running: Running) -> None:
        self.world, self.api, self.running = world, api, running
        self.names = [f"run-{number:02}" for number in range(MANY)]

    async def start(self) -> None:
        for name in self.names:
            self.world.create_run(name, steps=STEPS)
        await self.all("Running")
        self.api.writes.clear()

    async def all(self, phase: str) -> None:
        await self.world.until(lambda: {self.world.phase(name) for name in self.names} == {phase}, what=phase)

    def halt(self) -> float:
        """When that was."""
        document = "mode: Freeze\nselector: team=a\n"
        metadata = {"namespace": HOME, "name": EMERGENCY_CONFIG_MAP}
        self.world.api.add({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"drill": document}})
        return asyncio.get_running_loop().time()

    def lift(self) -> None:
        self.world.api.remove(CONFIG_MAPS, HOME, EMERGENCY_CONFIG_MAP)

    def counts(self) -> Counter[str]:
        return Counter(f"{verb} {kind}" for _, verb, kind in self.api.writes)


def with_fleet(scenario: Callable[[Fleet], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        api = SlowApi(world.api)
        running = Running(world, api)
        try:
            fleet = Fleet(world, api, running)
            await fleet.start()
            await scenario(fleet)
        finally:
            await running.cancel()
            await world.close()

    run_virtual(main())


def test_every_run_hears_by_redis_before_anything_is_written_and_records_come_before_statuses() -> None:
    async def scenario(fleet: Fleet) -> None:
        exchanges: list[tuple[float, int]] = []
        publish = fleet.running.operator.alarm._signals._publish
        assert publish is not None

        async def watched(envelopes: Mapping[str, BusEnvelope]) -> Mapping[str, Outcome]:
            exchanges.append((asyncio.get_running_loop().time(), len(envelopes)))
            return await publish(envelopes)

        fleet.running.operator.alarm._signals._publish = watched
        fleet.api.write_s = 0.1
        began = fleet.halt()
        await fleet.all("Halted")
        assert exchanges == [(began, MANY)]
        kinds = [(verb, kind) for _, verb, kind in fleet.api.writes]
        last_record = max(n for n, (_, kind) in enumerate(kinds) if kind == "ConfigMap")
        assert kinds.index(("apply_status", "EsperTrainingRun")) > last_record - MAX_WRITES_IN_FLIGHT
        counts = fleet.counts()
        assert counts["patch ConfigMap"] == MANY
        assert counts["patch Pod"] == 0  # all have answered
        assert counts["apply_status EsperTrainingRun"] <= 2 * MANY
        halts = [fleet.world.status(name)["halt"] for name in fleet.names]
        assert {(halt["source"], halt["acknowledged"], halt["expected"]) for halt in halts} == {("Broadcast", 1, 1)}
        for name in fleet.names:
            assert [entry["to"] for entry in fleet.world.status(name)["history"]][-2:] == ["Halting", "Halted"]

    with_fleet(scenario)


def test_a_halt_that_is_lifted_before_it_is_on_record_is_cleared_everywhere() -> None:
    async def scenario(fleet: Fleet) -> None:
        fleet.api.write_s = 2.0
        fleet.halt()
        await asyncio.sleep(1.0)
        assert fleet.counts()["patch ConfigMap"] == 0
        assert len(fleet.world.sent) == MANY
        fleet.lift()
        await asyncio.sleep(5.0)
        fleet.api.write_s = 0.0
        await fleet.world.until(lambda: sum(signal.clear for signal in fleet.world.sent) == MANY, what="clears")
        await fleet.all("Running")
        for name in fleet.names:
            uid = fleet.world.api.find(RUNS, NAMESPACE, name)["metadata"]["uid"]  # type: ignore[index]
            own = [signal for signal in fleet.world.sent if signal.run_uid == uid]
            assert [signal.clear for signal in own] == [False, True]
            assert own[0].signal_id == own[1].signal_id

    with_fleet(scenario)


def test_runs_stop_without_redis_too() -> None:
    async def scenario(fleet: Fleet) -> None:
        fleet.world.bus_up = False
        fleet.halt()
        await fleet.all("Halted")
        assert fleet.counts()["patch Pod"] == MANY

    with_fleet(scenario)


def test_a_bug_in_one_run_keeps_no_other_from_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fleet: Fleet) -> None:
        alarm = fleet.running.operator.alarm
        needs = alarm._needs

        def broken(run: Run) -> Any:
            if run.key.name == fleet.names[3]:
                raise RuntimeError("a bug")
            return needs(run)

        monkeypatch.setattr(alarm, "_needs", broken)
        fleet.halt()
        await asyncio.sleep(0)
        await fleet.all("Halted")  # that one too: by its reconcile

    with_fleet(scenario)
