"""The chart, rendered by real helm: valid by Kubernetes' own schemas, restricted, no wider than it needs to be."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/esper"
VARIANTS: dict[str, list[str]] = {
    "defaults": [],
    "external-redis": [
        "valkey.enabled=false",
        "redis.external.url=rediss://bus.example:6380/0",
        "redis.external.username=esper",
        "redis.external.secretName=bus",
    ],
    "external-redis-in-clear": ["valkey.enabled=false", "redis.external.url=redis://bus.example:6380/0"],
    "no-redis": ["valkey.enabled=false"],
    "own-certificate": ["valkey.tls.existingSecret=bus-tls", "valkey.existingSecret=bus"],
    "valkey-in-clear": ["valkey.tls.enabled=false", "redis.perRunUsers=false"],
    "namespaced": ["watchNamespaces={team-a,team-b}", "crds.enabled=false"],
    "everything": [
        "replicaCount=2",
        "networkPolicy.enabled=true",
        "podDisruptionBudget.enabled=true",
        "metrics.serviceMonitor.enabled=true",
        "metrics.podMonitor.enabled=true",
        "metrics.prometheusRule.enabled=true",
        "metrics.dashboards.enabled=true",
        "faultInjection.enabled=true",
        "imagePullSecrets[0].name=pull",
        "valkey.persistence.enabled=false",
        "extraEnv[0].name=HTTPS_PROXY",
        "extraEnv[0].value=proxy:3128",
        "nissa.enabled=true",
        "nissa.otlp.url=http://collector:4318/v1/logs",
        "nissa.otlp.headersSecretName=token",
    ],
    "external-redis-and-nissa": [
        "valkey.enabled=false",
        "redis.external.url=rediss://bus.example:6380/0",
        "redis.external.username=esper",
        "redis.external.secretName=bus",
        "nissa.enabled=true",
        "nissa.otlp.url=https://collector.example/v1/logs",
        "nissa.existingSecret=nissa-bus",
    ],
}
FOREIGN = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}

pytestmark = pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not here")


def helm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["helm", *words], capture_output=True, text=True, timeout=60, check=False)


def render(*values: str) -> list[dict[str, Any]]:
    sets = [word for value in values for word in ("--set", value)]
    done = helm("template", "esper", str(CHART), "-n", "esper-system", *sets)
    assert done.returncode == 0, done.stderr
    return [d for d in yaml.safe_load_all(done.stdout) if d]


@pytest.fixture(scope="module", params=list(VARIANTS))
def rendered(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(*VARIANTS[request.param])


def pod_specs(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents:
        if document["kind"] == "Pod":
            yield document["metadata"]["name"], document["spec"]
        elif "template" in document.get("spec", {}):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def test_every_object_is_valid_for_kubernetes(rendered: list[dict[str, Any]]) -> None:
    import kubernetes_validate

    for document in rendered:
        if document["kind"] not in FOREIGN | {"CustomResourceDefinition"}:
            kubernetes_validate.validate(document, "1.31", strict=True)


def test_pods_meet_the_restricted_standard(rendered: list[dict[str, Any]]) -> None:
    for name, spec in pod_specs(rendered):
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]


def test_no_environment_name_is_given_twice(rendered: list[dict[str, Any]]) -> None:
    """Server-side apply refuses duplicates."""
    for name, spec in pod_specs(rendered):
        for container in spec["containers"]:
            names = [entry["name"] for entry in container.get("env", [])]
            assert len(names) == len(set(names)), name


def test_every_object_carries_the_recommended_labels(rendered: list[dict[str, Any]]) -> None:
    wanted = {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by"}
    for document in rendered:
        if document["kind"] != "CustomResourceDefinition":
            assert wanted <= set(document["metadata"]["labels"]), document["metadata"]["name"]


def test_namespaced_installs_ask_for_no_cluster_role() -> None:
    documents = render(*VARIANTS["namespaced"], "rbac.aggregate=false")
    assert {d["kind"] for d in documents} & {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"} == set()
    assert {d["metadata"]["namespace"] for d in documents if d["kind"] == "Role"} == {
        "esper-system",
        "team-a",
        "team-b",
    }


def test_no_rule_uses_a_wildcard(rendered: list[dict[str, Any]]) -> None:
    for document in rendered:
        for rule in document.get("rules", []):
            assert "*" not in json.dumps(rule)


def test_the_crd_can_be_kept_and_left_out() -> None:
    def crds(*values: str) -> list[dict[str, Any]]:
        return [d for d in render(*values) if d["kind"] == "CustomResourceDefinition"]

    (kept,) = crds()
    assert kept["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    (removed,) = crds("crds.keep=false")
    assert "helm.sh/resource-policy" not in removed["metadata"].get("annotations", {})
    assert crds("crds.enabled=false") == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("imag.tag=x", "imag"),
        ("replicaCount=many", "replicaCount"),
        ("log.format=xml", "format"),
        ("redis.external.url=http://x", "url"),
        ("valkey.replicas=3", "replicas"),
        ("valkey.tls.enabled=maybe", "enabled"),
        ("redis.perRunUser=true", "perRunUser"),
        ("metrics.prometheusRule.runbookBaseUrl=docs", "runbookBaseUrl"),
        ("metrics.podMonitor.sampleLimit=10", "sampleLimit"),
        ("metrics.dashboard.enabled=true", "dashboard"),
    ],
)
def test_a_wrong_value_is_refused_by_name(value: str, words: str) -> None:
    done = helm("template", "esper", str(CHART), "--set", value)
    assert done.returncode != 0
    assert words in done.stderr


def test_two_buses_at_once_are_refused() -> None:
    done = helm("template", "esper", str(CHART), "--set", "redis.external.url=redis://x:6379")
    assert done.returncode != 0
    assert "valkey.enabled=false" in done.stderr


def test_the_operator_accepts_what_the_chart_sets(tmp_path: Path) -> None:
    """OperatorSettings refuses names that it does not know, and reads the files that it is told of."""
    from esper_operator.settings import OperatorSettings

    (tmp_path / "password").write_text("secret")
    (tmp_path / "ca.crt").write_text("authority")
    (deployment,) = [d for d in render() if d["kind"] == "Deployment"]
    entries = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    environ = {e["name"]: e.get("value", "here").replace("/etc/esper/bus", str(tmp_path)) for e in entries}
    settings = OperatorSettings.from_environ(environ)
    assert settings.bus_url == "rediss://esper-valkey.esper-system.svc:6379/0"
    assert settings.bus_username == "operator"
    core = settings.core(b"s" * 32, 1)
    assert (core.bus_password, core.bus_ca, core.bus_per_run_users) == ("secret", "authority", True)
    assert settings.sidecar_image.startswith("esper/sidecar:")


# Observability


def test_pods_are_scraped_with_the_labels_that_rules_and_dashboards_expect() -> None:
    """The Kubernetes labels are those that the operator sets on pods, in Prometheus' spelling."""
    from esper_leyline import labels, ports

    (monitor,) = [d for d in render("metrics.podMonitor.enabled=true") if d["kind"] == "PodMonitor"]
    spelled = {
        name: "__meta_kubernetes_pod_label_" + re.sub(r"[^a-zA-Z0-9_]", "_", label)
        for name, label in (("run", labels.RUN), ("attempt", labels.ATTEMPT), ("rank", labels.COMPLETION_INDEX))
    }
    endpoints = monitor["spec"]["podMetricsEndpoints"]
    assert {e["portNumber"] for e in endpoints} == {
        ports.WEATHERLIGHT_HTTP, ports.KASMINA_HTTP, ports.TAMIYO_HTTP, ports.TOLARIA_HTTP,
    }  # fmt: skip
    for endpoint in endpoints:
        assert {r["targetLabel"]: r["sourceLabels"] for r in endpoint["relabelings"]} == {
            name: [label] for name, label in spelled.items()
        }
    assert monitor["spec"]["sampleLimit"] >= 1000
    assert monitor["spec"]["labelLimit"]


def test_every_group_of_rules_is_a_prometheus_rule() -> None:
    found = [d for d in render("metrics.prometheusRule.enabled=true") if d["kind"] == "PrometheusRule"]
    files = sorted((CHART / "rules").glob("*.yaml"))
    assert [d["spec"] for d in found] == [yaml.safe_load(path.read_text()) for path in files]
    assert len({d["metadata"]["name"] for d in found}) == len(files) >= 6
    assert not [d for d in render() if d["kind"] == "PrometheusRule"]


def test_links_of_alerts_lead_to_the_repository_that_is_named() -> None:
    base = "https://code.example/esper/blob/v1"
    values = ("metrics.prometheusRule.enabled=true", f"metrics.prometheusRule.runbookBaseUrl={base}/")
    rules = [
        rule
        for document in render(*values)
        if document["kind"] == "PrometheusRule"
        for group in document["spec"]["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    for rule in rules:
        address = rule["annotations"]["runbook_url"]
        assert address == f"{base}/docs/reference/alerts.md#{rule['alert'].lower()}"
    assert rules


def test_dashboards_are_what_grafana_s_sidecar_looks_for() -> None:
    documents = render("metrics.dashboards.enabled=true", "metrics.dashboards.labels.team=ml")
    found = [d for d in documents if "grafana_dashboard" in d["metadata"].get("labels", {})]
    assert {d["kind"] for d in found} == {"ConfigMap"}
    assert {d["metadata"]["labels"]["grafana_dashboard"] for d in found} == {"1"}
    assert {d["metadata"]["labels"]["team"] for d in found} == {"ml"}
    given = {name: json.loads(text) for d in found for name, text in d["data"].items()}
    assert given == {path.name: json.loads(path.read_text()) for path in (CHART / "dashboards").glob("*.json")}
    assert {d["uid"] for d in given.values()} == {"esper-overview", "esper-run"}
    assert not [d for d in render() if "grafana_dashboard" in d["metadata"].get("labels", {})]
