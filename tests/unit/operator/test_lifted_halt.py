"""A halt that is lifted while the pod that it stopped is still there."""

import pytest
from esper_operator.testing.builders import Scene

from tests.support.scenes import phases, running


def lifted(mode: str) -> Scene:
    """The trainer has answered and its pod has not ended yet; the person already wants to go on."""
    stopped = running().stopped(mode).reconciled().acknowledging("DONE", phase="HALTED", saved_step=40).reconciled()
    assert stopped.status["phase"] == "Halted"
    return stopped.stopped("None").reconciled()


@pytest.mark.parametrize("mode", ["Checkpoint", "Kill"])
def test_a_pod_that_only_has_to_end_is_not_called_running(mode: str) -> None:
    scene = lifted(mode)
    for _ in range(2):
        assert scene.status["phase"] == "Pending"
        scene = scene.later(1).reconciled()
    gone = scene.failed(75).reconciled().reconciled().without_jobs().reconciled()
    assert gone.status["attempt"] == 2
    assert gone.with_pods(state="placed").reconciled().status["phase"] == "Starting"
    assert "Running" not in phases(gone)[phases(gone).index("Halted") :]


def test_a_thawed_pod_trains_on() -> None:
    frozen = running().stopped("Freeze").reconciled().acknowledging("DONE", phase="FROZEN").reconciled()
    assert frozen.stopped("None").reconciled().reporting("RUNNING", step=50).reconciled().status["phase"] == "Running"
