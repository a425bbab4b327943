"""A real Prometheus scrapes a real run through a rollback, a death of its trainer and a halt: every panel about runs
shows something, every rule can be evaluated, and nothing is exported that the catalogue does not declare.

The panels about the operator are looked at in tests/apiserver, where a real operator runs.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from esper_leyline.metrics import CATALOGUE, OF_PODS
from esper_runtime.nissa.alerts import ALERTS, RECORDINGS

from tests.nissa import scene
from tests.support.localruns import Laptop, paced, spec_of
from tests.support.prometheus import MISSING, Prometheus, free_port, tool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(tool("prometheus") is None, reason=MISSING),
]


NOT_HERE = {
    # Needs a GPU, a loader with workers, a profiler, or a workload that measures it
    *(f"tolaria.graph.{name}" for name in ("capture_ms", "replay_ms", "stage_copy_ms", "replays_total")),
    *("tolaria.train.input_wait_ms", "tolaria.train.h2d_copy_ms", "tolaria.training.accuracy"),
    *(f"tolaria.profiler.{name}" for name in ("enabled", "traces_emitted_total", "traces_failed_total")),
    *("tolaria.grad.clipped_total", "tolaria.amp.skipped_steps_total"),
    # Appears with its first event, and none of these happened
    *("tolaria.epochs.failed", "tolaria.emergency.halts_total", "tolaria.telemetry.dropped_total"),
    *("tolaria.timeout.tamiyo_total", "tolaria.timeout.kasmina_total", "tolaria.command.handled_total"),
    *("tolaria.lr_controller.violations_total", "tolaria.lr_violations_total", "tolaria.checkpoint.failures_total"),
    *(f"tolaria.opt.{name}_total" for name in ("rebuilds", "rebuild_failures", "rebuild_skipped")),
    *("tolaria.opt.rebuild_latency_ms", "tolaria.opt.state_preserved_ratio"),
    *(
        f"tolaria.rollback.{name}_total"
        for name in ("snapshot_rejected", "fast_misses", "failures", "deadline_exceeded")
    ),
    *("tolaria.boundary.breaches_total", "tolaria.emergency.transitions_total", "tolaria.conservative.seconds_total"),
    # A defect: nobody sets it
}
"""Metrics of pods that this run has no reason to export."""


class Watched(NamedTuple):
    server: Prometheus
    run: str
    start: float
    end: float


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    documents = paced(name="watched")
    spec_of(documents)["faultInjection"] = [
        {"kind": "NonFiniteLoss", "step": 150},
        {"kind": "KillTrainer", "step": 400},
    ]
    laptop = Laptop(tmp_path_factory.mktemp("laptop"), documents)
    start = time.time()
    with scene.prometheus(tmp_path_factory.mktemp("prometheus"), free_port()) as server:
        try:
            scene.live_through_faults(laptop, server)
            yield Watched(server, laptop.name, start, time.time())
        finally:
            laptop.close()


@pytest.mark.row("K47")
def test_no_panel_about_runs_is_empty(watched: Watched) -> None:
    found = scene.empty(watched.server, watched.run, start=watched.start, end=watched.end, of_operator=False)
    assert found == [], "\n".join(found)


def test_every_rule_can_be_evaluated(watched: Watched) -> None:
    rules = [rule for group in watched.server.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(ALERTS) + len(RECORDINGS)
    assert scene.errors_of_rules(watched.server) == []


def test_everything_that_is_exported_is_declared(watched: Watched) -> None:
    names = {name for name in watched.server.get("label/__name__/values") if name.startswith("esper_")}
    declared = {name for metric in CATALOGUE for name in metric.series}
    recorded = {recording.record for recording in RECORDINGS}
    assert names - declared - recorded == set()


@pytest.mark.row("K47")
def test_everything_that_is_declared_is_exported(watched: Watched) -> None:
    names = set(watched.server.get("label/__name__/values"))
    missing = {metric.name for metric in OF_PODS if not names & set(metric.series)}
    assert missing - NOT_HERE == set()


def test_the_dashboard_tells_what_happened(watched: Watched) -> None:
    """A rollback, a restart, a stop, a goodput that suffered from them. A busy machine may add a restart of its own."""

    def highest(expr: str) -> float:
        drawn = watched.server.series(expr, start=watched.start, end=watched.end)
        return max(float(value) for each in drawn for _, value in each["values"])

    of_run = f'{{run="{watched.run}"}}'
    assert highest(f"esper_tolaria_rollbacks_initiated_total{of_run}") >= 1
    assert highest(f"esper_tolaria_in_place_restarts_total{of_run}") >= 1
    assert highest(f"esper_weatherlight_emergency_mode{of_run}") == 1
    assert highest(f"esper_weatherlight_emergency_detections_total{of_run}") >= 2, "the order, and its end"
    assert 0 < highest(f"esper:goodput:ratio5m{of_run}") <= 1
    (up,) = watched.server.instant(f"count(up{of_run} == 1)")
    assert float(up["value"][1]) == len(scene.CONTAINERS)


def test_the_number_of_series_of_a_pod_is_bounded(watched: Watched) -> None:
    """Below the chart's sampleLimit by far."""
    for container in scene.CONTAINERS:
        (found,) = watched.server.instant(f'scrape_samples_scraped{{container="{container}"}}')
        assert 0 < float(found["value"][1]) < 1000, container
