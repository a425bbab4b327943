"""The operator dies when only Redis has a stop, and the person takes it back before the next operator is there."""

import asyncio
from typing import Any

import pytest
from esper_operator.assembly import Leadership

from tests.support.mortalapi import Killed
from tests.support.operatorworld import Running, World
from tests.support.virtualtime import run_virtual
from tests.support.wrappedapi import WrappedApi


class DiesAtConfigMap(WrappedApi):
    """Once it is armed."""

    armed = False

    def __init__(self, api: Any) -> None:
        super().__init__(api)
        self.died = asyncio.Event()

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.died.is_set():
            raise Killed
        if self.armed and name in ("patch", "create") and args[0].kind == "ConfigMap":
            await asyncio.sleep(0.05)  # Redis is quicker
            self.died.set()
            raise Killed
        return await getattr(self._api, name)(*args, **kwargs)


@pytest.mark.parametrize(("mode", "attempt"), [("Freeze", 1), ("Checkpoint", 2), ("Kill", 2)])
def test_a_stop_that_was_lifted_holds_nobody(mode: str, attempt: int) -> None:
    async def story() -> None:
        world = World()
        api = DiesAtConfigMap(world.api)
        first = Running(world, api)
        world.create_run("digits", steps=5000)
        await world.until(lambda: world.phase("digits") == "Running")
        api.armed = True
        world.set_spec("digits", emergencyStop=mode)
        await api.died.wait()
        await first.cancel()
        world.set_spec("digits", emergencyStop="None")
        await asyncio.sleep(5)
        second = Running(world, world.api, Leadership(held=lambda: True, term=lambda: 2))
        await asyncio.sleep(60)
        status = world.status("digits")
        assert (status["phase"], status["attempt"]) == ("Running", attempt), status
        assert world.condition("digits", "Halted") == "False/NotHalted"
        steps = status["progress"]["step"]
        await asyncio.sleep(60)
        assert world.status("digits")["progress"]["step"] > steps
        assert len(world.signals_sent("digits")) <= 2, "one to stop, one to lift it"
        await second.cancel()
        await world.close()

    run_virtual(story())
