"""The operator is killed before and after every one of its requests; the end must be as if it never was."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from esper_operator.kube.api import CLAIMS, CONFIG_MAPS, JOBS, PODS, RUNS, SECRETS, SERVICES

from tests.support.mortalapi import MortalApi
from tests.support.operatorworld import Running, World
from tests.support.virtualtime import run_virtual

Script = Callable[[World], Awaitable[None]]
KINDS = (RUNS, JOBS, SECRETS, CONFIG_MAPS, CLAIMS, SERVICES)
PAUSE_S = 2.0
"""From the death of an operator to the next one."""


async def trains(world: World) -> None:
    world.create_run("digits", steps=6, nan_at=3)
    await world.until(lambda: world.phase("digits") == "Succeeded")


async def halts_and_resumes(world: World) -> None:
    world.create_run("digits", steps=9)
    await world.until(lambda: world.status("digits").get("progress", {}).get("step", 0) >= 2 or stepped(world, 2))
    world.set_spec("digits", emergencyStop="Checkpoint")
    await world.until(lambda: world.phase("digits") == "Halted", what="Halted")
    assert world.status("digits")["halt"]["acknowledged"] == 1
    world.set_spec("digits", emergencyStop="None")
    await world.until(lambda: world.phase("digits") == "Succeeded", what="Succeeded")


async def freezes_and_thaws(world: World) -> None:
    world.create_run("digits", steps=9)
    await world.until(lambda: stepped(world, 2))
    world.set_spec("digits", emergencyStop="Freeze")
    await world.until(lambda: world.phase("digits") == "Halted", what="frozen")
    world.set_spec("digits", emergencyStop="None")
    await world.until(lambda: world.phase("digits") == "Succeeded", what="Succeeded")


async def is_suspended(world: World) -> None:
    world.create_run("digits", steps=12)
    await world.until(lambda: stepped(world, 6))
    world.set_spec("digits", suspend=True)
    await world.until(lambda: world.phase("digits") == "Suspended" and not world.pods("digits"), what="Suspended")
    world.set_spec("digits", suspend=False)
    await world.until(lambda: world.phase("digits") == "Succeeded", what="Succeeded")


async def crashes(world: World) -> None:
    world.create_run("digits", steps=12)
    await world.until(lambda: stepped(world, 6))
    pod = world.pods("digits")[0]["metadata"]["name"]
    world.crash(pod, 70)
    await world.until(lambda: world.phase("digits") == "Succeeded", what="Succeeded")


def stepped(world: World, step: int) -> bool:
    """By the trainer's own count: no operator is needed for it."""
    return any(training.step >= step for training in world.trainings())


async def play(script: Script, *, dies_at: int | None, after: bool) -> tuple[dict[str, Any], int]:
    """The end state, and how many requests the first operator made."""
    world = World()
    try:
        mortal = MortalApi(world.api, dies_at=dies_at, after=after)
        first = Running(world, mortal)
        nurse = asyncio.create_task(replace(world, first, mortal))
        await script(world)
        await asyncio.sleep(15)
        nurse.cancel()
        await asyncio.gather(nurse, return_exceptions=True)
        await first.cancel()
        return end_state(world), mortal.count
    finally:
        await world.close()


async def replace(world: World, first: Running, mortal: MortalApi) -> None:
    await mortal.died.wait()
    await first.cancel()
    await asyncio.sleep(PAUSE_S)
    second = Running(world, world.api)
    try:
        await asyncio.Event().wait()
    finally:
        await second.cancel()


def end_state(world: World) -> dict[str, Any]:
    """What must not depend on a death of the operator: objects, counts, results; no times, no stage only seen live."""
    status = world.status("digits")
    recovery = status.get("lastRecovery", {})
    halt = status.get("halt", {})
    history = [entry["to"] for entry in status["history"]]
    return {
        "objects": {
            r.kind: sorted(item["metadata"]["name"] for item in world.api.all(r)) for r in KINDS if r is not PODS
        },
        "pods": sorted(pod["metadata"]["name"].rsplit("-", 1)[0] for pod in world.api.all(PODS)),
        "phase": status["phase"],
        "conditions": {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]},
        "attempt": status["attempt"],
        "rollbacks": status["rollbacks"]["total"],
        "restarts": (status["restarts"]["total"], status["restarts"]["counted"]),
        "recovery": {k: recovery.get(k) for k in ("kind", "cause", "fromStep", "toStep")},
        "halt": {k: halt.get(k) for k in ("mode", "source", "acknowledged", "expected", "missing")},
        # Which step that is depends on when the signal could be sent; that it is the trainer's own word does not.
        "halt saved what the trainer says": halt.get("savedStep") == world.saved_by_halt,
        "step": status["progress"]["step"],
        "rollbacks shown": history.count("RollingBack"),
        "signals": world.signals_sent("digits"),
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", [trains, halts_and_resumes, freezes_and_thaws, is_suspended, crashes])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_request(script: Script, after: bool):
    expected, requests = run_virtual(play(script, dies_at=None, after=False))
    assert requests > 10
    for dies_at in range(1, requests + 1):
        found, _ = run_virtual(play(script, dies_at=dies_at, after=after))
        assert found == expected, f"killed at request {dies_at} of {requests}"
    print(f"\n{script.__name__}: killed {'after' if after else 'before'} each of {requests} requests, same end state")
