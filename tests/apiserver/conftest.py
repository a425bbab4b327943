"""One API server per test session; each test takes a namespace of its own."""

from collections.abc import Iterator

import pytest

from tests.support.controlplane import ControlPlane, running


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Without controllers: pods are admitted but nothing acts on anything."""
    with running(tmp_path_factory.mktemp("control-plane")) as plane:
        yield plane


@pytest.fixture(scope="session")
def control_plane_with_controllers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """With the kube-controller-manager: Jobs get pods, owners' children are collected, namespaces go away."""
    with running(tmp_path_factory.mktemp("control-plane"), controllers=True) as plane:
        yield plane
