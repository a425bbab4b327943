"""Which runs have a user in Redis, as the operator's caches see runs come and go."""

import dataclasses

from esper_operator.kube.api import RUNS

from tests.support.operatorworld import NAMESPACE, World
from tests.unit.operator.test_worker_story import in_world


def test_a_run_has_a_user_until_it_is_over_or_gone():
    async def scenario(world: World) -> None:
        world.settings = dataclasses.replace(world.settings, bus_per_run_users=True)
        async with world.operator() as operator:
            users = operator.bus_users
            world.create_run("short", steps=3)
            world.create_run("long", steps=10_000)
            uids = {name: world.api.find(RUNS, NAMESPACE, name)["metadata"]["uid"] for name in ("short", "long")}
            await world.until(lambda: set(users._wanted) == set(uids.values()), what="both are wanted")
            await world.until(lambda: world.phase("short") == "Succeeded")
            await world.until(lambda: set(users._wanted) == {uids["long"]}, what="the short one is over")
            assert users._due[uids["short"]] > users._due[uids["long"]]  # its pods may still speak
            world.api.remove(RUNS, NAMESPACE, "long")
            await world.until(lambda: not users._wanted, what="the long one is gone")
            assert set(users._due) == set(uids.values())

    in_world(scenario)


def test_without_users_per_run_there_is_nothing_to_do():
    async def scenario(world: World) -> None:
        async with world.operator() as operator:
            assert operator.bus_users is None

    in_world(scenario)
