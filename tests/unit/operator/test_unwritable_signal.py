"""Somebody made <run>-emergency immutable: a stop still stops."""

import asyncio
from typing import Any

import pytest
from esper_operator.kube.errors import Invalid

from tests.support.operatorworld import World
from tests.support.virtualtime import run_virtual
from tests.support.wrappedapi import WrappedApi


class Immutable(WrappedApi):
    on = False

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.on and name == "patch" and args[0].kind == "ConfigMap":
            raise Invalid("data: Forbidden: field is immutable when `immutable` is set")
        return await getattr(self._api, name)(*args, **kwargs)


def tells(world: World) -> bool:
    conditions = world.status("digits").get("conditions", [])
    return any("could not be put on record" in condition["message"] for condition in conditions)


@pytest.mark.parametrize("bus_up", [True, False])
def test_a_kill_and_a_suspension_fall_back_on_the_deletion_of_the_job(bus_up: bool) -> None:
    async def story() -> None:
        world = World()
        api = Immutable(world.api)
        async with world.operator(api):
            world.create_run("digits", steps=100_000)
            await world.until(lambda: world.phase("digits") == "Running")
            api.on, world.bus_up = True, bus_up
            world.set_spec("digits", emergencyStop="Kill")
            if not bus_up:  # else it is over before anybody could read it
                await world.until(lambda: tells(world))
            await asyncio.sleep(300)
            assert world.phase("digits") == "Halted"
            world.set_spec("digits", emergencyStop="None", suspend=True)
            await asyncio.sleep(300)
            assert (world.phase("digits"), world.pods("digits")) == ("Suspended", [])
        await world.close()

    run_virtual(story())
