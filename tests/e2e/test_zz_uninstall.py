"""Last in the session: what helm uninstall leaves."""

from collections.abc import Callable

from . import cluster as kit


def test_uninstall_leaves_runs_claims_and_the_crd(start: Callable[..., kit.RunHandle], release: kit.Cluster) -> None:
    run = start("examples/digits.yaml", name="stays", runtime={"config": {"epochs": 500}})
    run.wait_phase("Running", timeout_s=120)
    release.helm("uninstall", "esper", "-n", kit.SYSTEM, "--wait")
    assert run.get()["metadata"]["name"] == run.name
    assert run.kubectl("get", "pvc", "-o", "name").strip() == f"persistentvolumeclaim/{run.name}-checkpoints"
    assert "espertrainingruns.esper.dev" in release.kubectl("get", "crd", "-o", "name")
    run.kubectl("delete", "etr", run.name)
