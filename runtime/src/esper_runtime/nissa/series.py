"""Every series that a rule or panel may read, with its labels."""

from collections.abc import Iterable

from esper_leyline.metrics import NISSA, OF_PODS, OPERATOR, Metric

from esper_runtime.nissa import promql
from esper_runtime.nissa.model import Recording

POD_LABELS = frozenset({"namespace", "run", "attempt", "rank", "pod", "container", "instance", "job"})
"""What the chart's PodMonitor adds."""
OPERATOR_LABELS = frozenset({"namespace", "pod", "container", "instance", "job"})
FOREIGN = {
    "up": POD_LABELS,
    "ALERTS": frozenset({"alertname", "alertstate", "severity"}),
    "process_resident_memory_bytes": POD_LABELS,
}
"""Of Prometheus itself, and of prometheus_client."""


def known(recordings: Iterable[Recording] = ()) -> dict[str, frozenset[str]]:
    found = dict(FOREIGN)
    for metrics, scraped in ((OF_PODS, POD_LABELS), (OPERATOR, OPERATOR_LABELS), (NISSA, OPERATOR_LABELS)):
        for metric in metrics:
            found |= _of(metric, scraped)
    for recording in recordings:
        found[recording.record] = found.get(recording.record, frozenset()) | {*recording.labels, *recording.of}
    return found


def _of(metric: Metric, scraped: frozenset[str]) -> dict[str, frozenset[str]]:
    own = scraped | set(metric.labels)
    return {name: own | {"le"} if name.endswith("_bucket") else own for name in metric.series}


def problems(expr: str, series: dict[str, frozenset[str]]) -> list[str]:
    """What the expression reads that nobody exports, in words."""
    found = []
    there: set[str] = set()
    for selector in promql.selectors(expr):
        labels = series.get(selector.series)
        if labels is None:
            found.append(f"{selector.series} is exported by nobody")
            continue
        there |= labels
        found += [f"{selector.series} has no label {label}" for label in sorted(selector.labels - labels)]
    found += [f"no series of it has the label {label}" for label in sorted(promql.groupings(expr) - there)]
    return found
