"""Figures of the API server's audit log: what the operator writes, and that only one of two operators does."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from esper_operator.api import crd

from tests.apiserver.operators import Cluster, cluster
from tests.support.controlplane import ControlPlane
from tests.support.waiting import until

pytestmark = [pytest.mark.apiserver, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
async def place(control_plane_with_controllers: ControlPlane, tmp_path: Path) -> AsyncIterator[Cluster]:
    control_plane_with_controllers.install_crd(crd.manifest())
    async with cluster(control_plane_with_controllers, tmp_path, step_s=0.5) as made:
        yield made


async def test_writes_are_one_per_transition_and_progress_every_ten_seconds(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=60, nan_at=20)
    status = await place.phase("digits", "Succeeded", 90)
    writes = place.write_counts()
    statuses = writes["patch espertrainingruns/status"]
    stages = len(status["history"])
    seconds = 35
    print(f"\nwrites of one run of about {seconds} s with a rollback: {dict(writes)}; {stages} history entries")
    assert writes["create jobs"] == 1
    assert statuses <= stages + seconds / 10 + 2
    assert not [w for w in place.writes() if w[2] == 409], "conflicts with itself"


async def test_nothing_is_written_when_nothing_changes(place: Cluster) -> None:
    operator = place.start_operator()
    place.create_run("digits", steps=1000)
    await until(lambda: place.node.pod_names("digits") and place.node.training("digits").step > 2, 30)
    place.set_spec("digits", emergencyStop="Freeze")
    await place.phase("digits", "Halted")
    await asyncio.sleep(2)  # Events follow the status from a queue of their own
    mark = place.audit_mark()
    await asyncio.sleep(12)
    frozen = place.write_counts(mark)
    operator.kill()
    place.start_operator("two")
    await until(lambda: "reconciling" in place.operators[-1].log.read_text(), 45, "the second operator leads")
    await asyncio.sleep(5)
    restarted = place.write_counts(mark)
    print(f"\nwrites in 12 s of a frozen run: {dict(frozen)}; with a restart of the operator: {dict(restarted)}")
    assert not frozen
    assert not restarted


async def test_of_two_operators_only_the_leader_writes(place: Cluster) -> None:
    first = place.start_operator("one")
    await until(lambda: "leading as" in first.log.read_text(), 30, "the first leads")
    second = place.start_operator("two")
    await until(lambda: "lease" in second.log.read_text() or second.process.poll() is None, 10)
    place.create_run("digits", steps=400)
    await place.phase("digits", "Running")
    assert "leading as" not in second.log.read_text()
    first.pause()
    await until(lambda: "leading as" in second.log.read_text(), 45, "the second takes over")
    mark = place.audit_mark()
    place.set_spec("digits", emergencyStop="Checkpoint")
    await place.phase("digits", "Halted")
    first.go_on()
    await until(lambda: first.process.poll() is not None, 15, "the old leader ends itself")
    assert first.process.returncode == 1
    assert not [w for w in place.writes(mark) if w[2] == 409]
    assert second.stop() == 0
