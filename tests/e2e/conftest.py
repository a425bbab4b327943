"""One cluster and one release per session, one namespace per test, everything kept of a failed one."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from . import cluster as kit

_REPORTS = pytest.StashKey[dict[str, pytest.TestReport]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    item.stash.setdefault(_REPORTS, {})[report.when] = report
    return report


@pytest.fixture(scope="session")
def cluster() -> Iterator[kit.Cluster]:
    made = kit.make()
    yield made
    kit.remove(made)


@pytest.fixture(scope="session")
def release(cluster: kit.Cluster) -> kit.Cluster:
    """The chart installed from this repository."""
    try:
        cluster.install()
    except kit.Failed:
        folder = kit.ROOT / "e2e-artifacts" / "install"
        kit.collect(cluster, kit.SYSTEM, folder)
        print(f"e2e: kept in {folder}")
        raise
    return cluster


@pytest.fixture
def namespace(release: kit.Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    name = "e2e-" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:50].strip("-")
    release.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=true", timeout_s=180)
    release.kubectl("create", "namespace", name)
    release.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield name
    reports = request.node.stash.get(_REPORTS, {})
    if any(report.failed for report in reports.values()):
        folder = kit.ROOT / "e2e-artifacts" / request.node.name
        kit.collect(release, name, folder)
        print(f"e2e: logs, events and resources are in {folder}")
    release.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def start(release: kit.Cluster, namespace: str) -> Callable[..., kit.RunHandle]:
    """start("examples/digits.yaml", name="a", runtime={…}) applies it and gives a handle."""

    def _start(path: str = "examples/digits.yaml", *, name: str | None = None, **spec: Any) -> kit.RunHandle:
        text, run = kit.manifest(path, name=name, **spec)
        release.kubectl("-n", namespace, "apply", "-f", "-", stdin=text)
        return kit.RunHandle(release, namespace, run)

    return _start
