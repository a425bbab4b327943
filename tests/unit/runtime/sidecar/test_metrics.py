"""What the sidecars and the supervisor export is what the catalogue declares, and all of it is set by somebody."""

import ast
import re
from pathlib import Path
from types import ModuleType

import esper_runtime.kasmina.service
import esper_runtime.otlp.metrics
import esper_runtime.tamiyo.service
import esper_runtime.weatherlight.metrics
import pytest
from esper_leyline.metrics import KASMINA, NISSA, OONA, SUPERVISOR, TAMIYO, WEATHERLIGHT, Metric, MetricKind
from esper_leyline.v1.report_pb2 import Counters
from esper_runtime.sidecar.metrics import Exporter
from esper_runtime.tolaria import supervisor
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

MODULES: dict[ModuleType, tuple[Metric, ...]] = {
    esper_runtime.kasmina.service: KASMINA,
    esper_runtime.tamiyo.service: TAMIYO,
    esper_runtime.weatherlight.metrics: (*WEATHERLIGHT, *OONA),
    esper_runtime.otlp.metrics: NISSA,
}
SETTERS = {"inc", "set", "observe", "labels", "set_function"}


def families(registry: CollectorRegistry) -> dict[str, str]:
    """Name as scraped -> kind."""
    found = {f.name: f.type for f in text_string_to_metric_families(generate_latest(registry).decode())}
    return {
        n + ("_total" if kind == "counter" else ""): kind for n, kind in found.items() if not n.endswith("_created")
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_sidecar_exports_its_part_of_the_catalogue(module: ModuleType) -> None:
    registry = CollectorRegistry()
    made = module.Metrics(registry)
    if module is esper_runtime.weatherlight.metrics:
        made.totals(Counters())  # those of the run are absent until its trainer has spoken
    assert families(registry) == {metric.prometheus: metric.kind for metric in MODULES[module]}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_one_of_them_is_set_somewhere(module: ModuleType) -> None:
    """Attributes that hold a metric, against those on which something is called that changes it."""
    path = Path(str(module.__file__))
    made = set(re.findall(r"self\.(\w+) = make\.", path.read_text()))
    used = set()
    for source in path.parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in SETTERS and isinstance(node.value, ast.Attribute):
                used.add(node.value.attr)
    assert made
    assert made - used == set()


def test_series_that_are_known_beforehand_are_there_from_the_start() -> None:
    registry = CollectorRegistry()
    make = Exporter(registry)
    known = (("a",), ("b",))
    make.counter(Metric("x.c_total", MetricKind.COUNTER, "1", "C", ("l",), known=known))
    make.gauge(Metric("x.g", MetricKind.GAUGE, "1", "G", ("l",), known=known))
    make.histogram(Metric("x.h", MetricKind.HISTOGRAM, "1", "H", ("l",), (1.0, 2.0), known))
    text = generate_latest(registry).decode()
    for line in ('esper_x_c_total{l="a"} 0.0', 'esper_x_g{l="b"} 0.0', 'esper_x_h_bucket{l="b",le="2.0"} 0.0'):
        assert line in text


def test_the_supervisor_tells_what_the_catalogue_declares() -> None:
    """Of its samples: (name, kind, text, value)."""
    source = (Path(str(supervisor.__file__)).parent / "loop.py").read_text()
    told = {
        (words[0].value, words[1].value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Tuple) and len(words := node.elts) == 4
        and all(isinstance(word, ast.Constant) for word in words[:2])
    }  # fmt: skip
    assert told == {(metric.name.removeprefix("tolaria."), str(metric.kind)) for metric in SUPERVISOR}
