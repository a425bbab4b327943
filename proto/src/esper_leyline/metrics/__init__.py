"""All metrics, declared once: whoever exports, scrapes, draws or alarms takes the names from here.

A name is written with dots; Prometheus has it with underscores behind `esper_`. One module per subsystem; what nobody
sets is not declared.
"""

from esper_leyline.metrics.kasmina import KASMINA
from esper_leyline.metrics.model import Metric, MetricKind
from esper_leyline.metrics.nissa import NISSA
from esper_leyline.metrics.oona import OONA
from esper_leyline.metrics.operator import OPERATOR
from esper_leyline.metrics.reference import names, reference
from esper_leyline.metrics.tamiyo import TAMIYO
from esper_leyline.metrics.tolaria import BOUNDARY_BUCKETS_MS, ROLLBACK_BUCKETS_MS, SUPERVISOR, TOLARIA
from esper_leyline.metrics.weatherlight import WEATHERLIGHT

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in TOLARIA}
"""Of a trainer, by their dotted names."""
OF_PODS: tuple[Metric, ...] = (*TOLARIA, *SUPERVISOR, *KASMINA, *TAMIYO, *WEATHERLIGHT, *OONA)
CATALOGUE: tuple[Metric, ...] = (*OF_PODS, *OPERATOR, *NISSA)

__all__ = [
    "BOUNDARY_BUCKETS_MS",
    "BY_NAME",
    "CATALOGUE",
    "KASMINA",
    "NISSA",
    "OF_PODS",
    "OONA",
    "OPERATOR",
    "ROLLBACK_BUCKETS_MS",
    "SUPERVISOR",
    "TAMIYO",
    "TOLARIA",
    "WEATHERLIGHT",
    "Metric",
    "MetricKind",
    "names",
    "reference",
]
