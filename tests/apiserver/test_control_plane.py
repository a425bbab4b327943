"""The tier's own foundation: what every other test here takes for granted."""

import pytest

from tests.support.controlplane import ControlPlane, wait_until

pytestmark = pytest.mark.apiserver


def test_requests_leave_audit_lines(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace("audit")

    def seen() -> bool:
        return any(e["objectRef"].get("name") == namespace for e in control_plane.audit() if "objectRef" in e)

    wait_until(seen, "the audit line")


def test_unknown_token_is_refused(control_plane: ControlPlane) -> None:
    assert control_plane.request("GET", "/api/v1/namespaces", token="nobody").status == 401


@pytest.mark.slow
def test_controllers_make_pods_of_jobs(control_plane_with_controllers: ControlPlane) -> None:
    plane = control_plane_with_controllers
    namespace = plane.namespace("jobs")
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "none"}]}}
    job = {"metadata": {"name": "one"}, "spec": {"template": template}}
    assert plane.create(f"/apis/batch/v1/namespaces/{namespace}/jobs", job).ok
    path = f"/api/v1/namespaces/{namespace}/pods"
    wait_until(lambda: len(plane.request("GET", path).body["items"]) == 1, "the Job's pod")
