"""Groups of rules as Prometheus reads them; the chart wraps each file into a PrometheusRule."""

from typing import Any

import yaml

from esper_runtime.nissa.model import Alert, Group, Recording

PAGE = "docs/reference/alerts.md"
"""The chart puts an address before it."""


def render(group: Group) -> str:
    rules = [_recording(recording) for recording in group.recordings] + [_alert(alert) for alert in group.alerts]
    document = {"groups": [{"name": group.name, "interval": group.interval, "rules": rules}]}
    return yaml.safe_dump(document, sort_keys=False, width=1000, allow_unicode=True)


def anchor(name: str) -> str:
    return name.lower()


def _recording(recording: Recording) -> dict[str, Any]:
    found: dict[str, Any] = {"record": recording.record, "expr": recording.expr}
    return {**found, "labels": recording.labels} if recording.labels else found


def _alert(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.wait,
        "labels": {"severity": alert.severity.value},
        "annotations": {
            "summary": alert.summary,
            "description": f"{alert.value} {alert.action}",
            "dashboard": alert.panel,
            "runbook_url": f"{PAGE}#{anchor(alert.name)}",
        },
    }
