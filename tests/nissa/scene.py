"""A real Prometheus with the chart's rules that scrapes a real run, and what its panels and rules show."""

import math
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esper_leyline import labels
from esper_leyline.metrics import OPERATOR
from esper_runtime.nissa import promql
from esper_runtime.nissa.dashboards import DASHBOARDS
from esper_runtime.nissa.model import Panel, Query

from tests.support.localruns import Laptop
from tests.support.prometheus import Prometheus
from tests.support.waiting import until_sync

RULES = Path(__file__).resolve().parents[2] / "charts/esper/rules"
RATE_INTERVAL = "15s"
CONTAINERS = (labels.TOLARIA, *labels.SIDECARS)
GOODPUT_S = 50.0
"""Of data that its slope needs."""
_OF_OPERATOR = {name for metric in OPERATOR for name in metric.series}
Targets = list[tuple[int, dict[str, str]]]


@contextmanager
def prometheus(directory: Path, port: int) -> Iterator[Prometheus]:
    """Evaluates the chart's rules every two seconds: nobody waits for half a minute here."""
    rules = []
    for path in sorted(RULES.glob("*.yaml")):
        rules.append(directory / path.name)
        rules[-1].write_text(re.sub(r"^  interval: \w+$", "  interval: 2s", path.read_text(), flags=re.M))
    server = Prometheus(directory, port=port, rules=rules)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def targets(laptop: Laptop) -> Targets:
    """The containers of a local run, labelled as the chart's PodMonitor labels those of a pod."""
    attempt = str(laptop.status().get("attempt", 1))
    found = []
    for container in CONTAINERS:
        port = int((laptop.scratch()[0] / "run" / f"{container}.port").read_text())
        marks = {
            "namespace": "default",
            "run": laptop.name,
            "attempt": attempt,
            "rank": "0",
            "pod": f"{laptop.name}-a{attempt}-0",
            "container": container,
        }
        found.append((port, marks))
    return found


def live_through_faults(laptop: Laptop, server: Prometheus, others: Targets | None = None) -> None:
    """A run that rolls back, loses its trainer, is frozen, and goes on; scraped all the while. It still runs after."""
    laptop.run("--stay")
    laptop.until_phase("Running")
    began = time.monotonic()
    server.targets([*targets(laptop), *(others or [])])
    laptop.until(lambda: laptop.status().get("rollbacks", {}).get("total"), "a rollback")
    laptop.until(lambda: laptop.status().get("restarts", {}).get("total"), "a restart of the trainer")
    laptop.until_phase("Running")
    laptop.until_step(laptop.step() + 50)
    halted = laptop.esper("halt", laptop.name, "--mode", "Freeze")
    assert halted.returncode == 0, halted.stderr
    firing = 'ALERTS{alertname="WeatherlightEmergencyHalt",alertstate="firing"}'
    until_sync(lambda: server.instant(firing), what="the alert of the halt")
    resumed = laptop.esper("resume", laptop.name)
    assert resumed.returncode == 0, resumed.stderr
    laptop.until_step(laptop.step() + 50)
    until_sync(lambda: not server.instant(firing), what="the alert is cleared")
    time.sleep(max(0.0, began + GOODPUT_S - time.monotonic()))


def first_moment(server: Prometheus, run: str) -> float:
    """When the run's trainer was seen first, in seconds of the wall clock."""
    (found,) = server.instant(f'min_over_time(timestamp(esper_tolaria_trainer_step{{run="{run}"}})[1h:1s])')
    return float(found["value"][1])


def filled_in(expr: str, run: str) -> str:
    """With what Grafana would put in the place of its variables."""
    for name, value in (("__rate_interval", RATE_INTERVAL), ("namespace", "default"), ("run", run)):
        expr = expr.replace(f"${name}", value)
    return expr


def values(server: Prometheus, query: Query, run: str, *, start: float, end: float) -> list[dict[str, Any]]:
    """Series of a panel's query that have a finite value anywhere."""
    found = server.series(filled_in(query.expr, run), start=start, end=end)
    return [each for each in found if any(math.isfinite(float(value)) for _, value in each["values"])]


def reads_operator(panel: Panel) -> bool:
    return any(s.series in _OF_OPERATOR for query in panel.queries for s in promql.selectors(query.expr))


def empty(server: Prometheus, run: str, *, start: float, end: float, of_operator: bool) -> list[str]:
    """Queries of panels that show nothing, of those that read the operator's metrics or of the others."""
    return [
        f"{name}/{panel.key}: {filled_in(query.expr, run)}"
        for name, dashboard in DASHBOARDS.items()
        for panel in dashboard.panels
        if reads_operator(panel) is of_operator and not panel.expected_empty
        for query in panel.queries
        if not values(server, query, run, start=start, end=end)
    ]


def errors_of_rules(server: Prometheus) -> list[str]:
    """Of rules that cannot be evaluated, or whose words cannot be filled in."""
    found = []
    for rule in _rules(server):
        if rule["health"] != "ok" or rule.get("lastError"):
            found.append(f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}")
        for alert in rule.get("alerts", ()):
            found += [f"{rule['name']}: {text}" for text in alert["annotations"].values() if "<error" in text]
    return found


def _rules(server: Prometheus) -> Iterable[dict[str, Any]]:
    for group in server.get("rules")["groups"]:
        yield from group["rules"]
