"""Whole runs through the operator's own loop, over an API server in memory and in virtual time."""

from collections.abc import Awaitable, Callable

from tests.support.operatorworld import World
from tests.support.virtualtime import run_virtual


def in_world(scenario: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        try:
            await scenario(world)
        finally:
            await world.close()

    run_virtual(main())


def transitions(world: World, name: str) -> list[str]:
    return [entry["to"] for entry in world.status(name).get("history", [])]


def test_a_run_trains_rolls_back_and_succeeds():
    async def scenario(world: World) -> None:
        world.create_run("digits", nan_at=7)
        async with world.operator():
            await world.until(lambda: world.phase("digits") == "Succeeded")
            status = world.status("digits")
        assert transitions(world, "digits") == [
            "Pending", "Starting", "Running", "RollingBack", "Running", "Succeeded",
        ]  # fmt: skip
        assert status["rollbacks"]["total"] == 1
        assert status["lastRecovery"]["kind"] == "InProcess"
        assert status["progress"]["step"] == 20
        assert world.condition("digits", "Complete") == "True/Complete"

    in_world(scenario)
