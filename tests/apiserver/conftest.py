"""One API server per test session; each test takes a namespace of its own."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from esper_operator.api import crd

from tests.apiserver.operators import Cluster, cluster
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


@pytest.fixture
def step_s() -> float:
    """How long a trainer takes for a step; for a module to override."""
    return 0.1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def colony(
    control_plane_with_controllers: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    """A namespace with a node, Redis and an operator that leads, for a whole module: each test has its own runs."""
    control_plane_with_controllers.install_crd(crd.manifest())
    async with cluster(control_plane_with_controllers, tmp_path_factory.mktemp("colony")) as made:
        await made.leading_operator()
        yield made


@pytest.fixture
async def place(control_plane_with_controllers: ControlPlane, tmp_path: Path, step_s: float) -> AsyncIterator[Cluster]:
    """A namespace for one test, with a node and Redis, and no operator yet."""
    control_plane_with_controllers.install_crd(crd.manifest())
    async with cluster(control_plane_with_controllers, tmp_path, step_s=step_s) as made:
        yield made
