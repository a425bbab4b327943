"""A real Prometheus scrapes a real operator: no panel about it is empty, and it exports what is declared."""

import time
from pathlib import Path

import pytest
from esper_leyline.metrics import OPERATOR

from tests.apiserver.operators import Cluster
from tests.nissa import scene
from tests.support.prometheus import MISSING, free_port, tool

pytestmark = [
    pytest.mark.apiserver,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(tool("prometheus") is None, reason=MISSING),
]


async def live(colony: Cluster) -> None:
    """A run that rolls back, is stopped, goes on and ends."""
    colony.create_run("seen", steps=60, nan_at=7)
    await colony.stepped("seen", 15)
    colony.set_spec("seen", emergencyStop="Freeze")
    await colony.phase("seen", "Halted")
    colony.set_spec("seen", emergencyStop="None")
    await colony.phase("seen", "Succeeded")


@pytest.mark.row("K47")
async def test_no_panel_about_the_operator_is_empty(colony: Cluster, tmp_path: Path) -> None:
    start = time.time()
    with scene.prometheus(tmp_path, free_port()) as server:
        server.targets([(colony.operator.port, {"namespace": colony.namespace, "pod": colony.operator.name})])
        await colony.until(lambda: server.instant("esper_leader == 1"), "a leader that is scraped")
        await live(colony)
        await colony.until(lambda: server.instant('esper_runs{phase="Succeeded"} >= 1'), "the end is scraped")
        found = scene.empty(server, "seen", start=start, end=time.time(), of_operator=True)
        assert found == [], "\n".join(found)
        assert scene.errors_of_rules(server) == []
        names = {name for name in server.get("label/__name__/values") if name.startswith("esper_")}
        declared = {name for metric in OPERATOR for name in metric.series}
        assert {name for name in names if not name.startswith("esper_slo:")} <= declared
