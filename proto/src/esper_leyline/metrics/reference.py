"""docs/reference/metrics.md."""

from esper_leyline import ports
from esper_leyline.metrics.kasmina import KASMINA
from esper_leyline.metrics.model import Metric
from esper_leyline.metrics.nissa import NISSA
from esper_leyline.metrics.oona import OONA
from esper_leyline.metrics.operator import OPERATOR
from esper_leyline.metrics.tamiyo import TAMIYO
from esper_leyline.metrics.tolaria import SUPERVISOR, TOLARIA
from esper_leyline.metrics.weatherlight import WEATHERLIGHT

_INTRODUCTION = """
# Metrics

What the operator and the containers of a run's pods serve at `/metrics`. Histograms have samples `…_bucket`, `…_sum`
and `…_count`. The chart's PodMonitor adds the labels `namespace`, `run`, `attempt`, `rank`, `pod` and `container` to
those of pods. Alerts are in [alerts.md](alerts.md). Generated from `esper_leyline.metrics`; do not edit.
"""

_SECTIONS: tuple[tuple[str, str, tuple[Metric, ...]], ...] = (
    (
        "Trainer",
        f"One trainer process; its supervisor serves them on port {ports.TOLARIA_HTTP}. Counters begin at 0 with\n"
        "each process (those whose labels are not known beforehand, with their first event); other metrics appear\n"
        "when they are first set. At the end of each epoch those without labels are in the run's record, by their\n"
        "dotted names.",
        TOLARIA,
    ),
    ("Supervisor", f"Of container tolaria, port {ports.TOLARIA_HTTP}.", SUPERVISOR),
    ("Kasmina", f"Port {ports.KASMINA_HTTP}.", KASMINA),
    ("Tamiyo", f"Port {ports.TAMIYO_HTTP}.", TAMIYO),
    ("Weatherlight", f"Port {ports.WEATHERLIGHT_HTTP}.", WEATHERLIGHT),
    ("Oona", f"The message fabric, as weatherlight sees it: port {ports.WEATHERLIGHT_HTTP}.", OONA),
    (
        "Operator",
        f"Port {ports.OPERATOR_HTTP}. No label has an unbounded set of values: runs, pods and nodes are never labels.",
        OPERATOR,
    ),
    ("Nissa", f"The export of run events, port {ports.NISSA_HTTP}.", NISSA),
)


def reference() -> str:
    """The page."""
    lines = _INTRODUCTION.strip().splitlines()
    for title, text, metrics in _SECTIONS:
        lines += ["", f"## {title}", "", *text.splitlines(), ""]
        lines += ["| Name | Prometheus | Type | Unit | Labels | Meaning |", "|---|---|---|---|---|---|"]
        lines += [_row(metric) for metric in metrics]
    return "\n".join(lines) + "\n"


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    names = f"`{metric.name}` | `{metric.prometheus}`"
    return f"| {names} | {metric.kind} | {metric.unit} | {labels} | {metric.help} |"


def names() -> list[str]:
    """A line for each metric with what others build on: its name in Prometheus, its kind and its labels."""
    catalogue = (metric for _, _, metrics in _SECTIONS for metric in metrics)
    return [" ".join([metric.prometheus, metric.kind, *metric.labels]) for metric in catalogue]
