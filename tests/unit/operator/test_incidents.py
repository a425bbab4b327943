"""Events, logs and status of the operator carry the id of what they are about."""

import json
import logging

import pytest
from esper_leyline.incidents import ANNOTATION, FIELD, incident_at
from esper_leyline.reasons import RunReason
from esper_operator.kube.api import EVENTS, RUNS
from esper_operator.logs import JsonFormatter, TextFormatter

from tests.support.operatorworld import NAMESPACE, World
from tests.support.virtualtime import run_virtual


def annotated(world: World, incident: str) -> set[str]:
    """Reasons of the Kubernetes Events with that id."""
    events = world.api.all(EVENTS)
    return {str(e["reason"]) for e in events if e["metadata"].get("annotations", {}).get(ANNOTATION) == incident}


def logged(caplog: pytest.LogCaptureFixture, incident: str) -> list[str]:
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    return [line["message"] for line in lines if line.get(FIELD) == incident]


def test_one_id_follows_a_rollback_and_another_a_halt(caplog: pytest.LogCaptureFixture) -> None:
    found: dict[str, str] = {}

    async def scenario() -> None:
        world = World()
        try:
            world.create_run("digits", steps=60, nan_at=7)
            async with world.operator() as operator:
                await world.until(lambda: world.status("digits").get("rollbacks", {}).get("total") == 1)
                found["rollback"] = world.status("digits")["lastRecovery"]["incident"]
                world.set_spec("digits", emergencyStop="Freeze")
                await world.until(lambda: world.phase("digits") == "Halted")
                found["halt"] = world.status("digits")["halt"]["id"]
                world.set_spec("digits", emergencyStop="None")
                await world.until(lambda: world.phase("digits") == "Running")
                await operator.events.flush(60)
            uid = world.api.find(RUNS, NAMESPACE, "digits")["metadata"]["uid"]
            assert found["rollback"] == incident_at(uid, 1, 0, 1, 1, 1)
            assert annotated(world, found["rollback"]) == {RunReason.ROLLED_BACK}
            assert annotated(world, found["halt"]) == {
                RunReason.HALT_REQUESTED, RunReason.FROZEN, RunReason.RESUMED,
            }  # fmt: skip
        finally:
            await world.close()

    with caplog.at_level(logging.INFO):
        run_virtual(scenario())
    assert any("RolledBack" in line for line in logged(caplog, found["rollback"]))
    assert any("HaltRequested" in line for line in logged(caplog, found["halt"]))
    assert found["halt"] != found["rollback"]


def test_a_line_for_people_ends_with_the_incident() -> None:
    record = logging.makeLogRecord({"msg": "halted", "levelname": "INFO", "name": "x", FIELD: "ab"})
    assert TextFormatter().format(record).endswith("halted [incident ab]")
