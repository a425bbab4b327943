"""docs/reference/alerts.md: what each alert means and what to do, and the objectives."""

import re

from esper_runtime.nissa.alerts import GROUPS
from esper_runtime.nissa.dashboards import DASHBOARDS, panel
from esper_runtime.nissa.model import Alert
from esper_runtime.nissa.slos import SLOS

_TEMPLATE = re.compile(r"\{\{\s*\$labels\.(\w+)\s*\}\}")
_VALUE = re.compile(r"\{\{\s*\$value\s*\|\s*\w+\s*\}\}")

_INTRODUCTION = """
# Alerts

Rules of Prometheus that the chart brings with `metrics.prometheusRule.enabled=true`; they need
`metrics.serviceMonitor.enabled` and `metrics.podMonitor.enabled` too. `critical`: somebody should come; `warning`:
somebody should look in the next hours. Dashboards come with `metrics.dashboards.enabled=true`
([pictures](../dashboards.md)), metrics are in [metrics.md](metrics.md). Generated from `esper_runtime.nissa`; do not
edit.
"""


def reference() -> str:
    lines = [*_INTRODUCTION.strip().splitlines(), "", "| Alert | Severity | Condition |", "|---|---|---|"]
    for group in GROUPS:
        lines += [f"| [{a.name}](#{a.name.lower()}) | {a.severity} | {_plain(a.summary)} |" for a in group.alerts]
    lines += ["", "## Objectives", "", "| Objective | Share | Meaning |", "|---|---|---|"]
    lines += [f"| `{slo.name}` | {slo.objective * 100:g} % | {slo.text}. |" for slo in SLOS]
    for group in GROUPS:
        for alert in group.alerts:
            lines += _section(alert)
    return "\n".join(lines) + "\n"


def _section(alert: Alert) -> list[str]:
    name, _, _ = alert.panel.partition("/")
    wait = "" if alert.wait == "0s" else f", for {alert.wait}"
    return [
        "",
        f"## {alert.name}",
        "",
        f"{alert.severity.value.capitalize()}. {alert.cause}",
        "",
        f"* Do: {alert.action}",
        f"* See: *{panel(alert.panel).title}* on the dashboard *{DASHBOARDS[name].title}*.",
        f"* Condition{wait}:",
        "",
        "```promql",
        alert.expr,
        "```",
    ]


def _plain(text: str) -> str:
    """Without Prometheus' templates, as somebody would say it."""
    return _VALUE.sub("…", _TEMPLATE.sub(lambda found: f"*{found[1]}*", text))
