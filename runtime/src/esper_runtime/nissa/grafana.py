"""A dashboard as Grafana's JSON."""

import json
from collections.abc import Iterator
from typing import Any

from esper_runtime.nissa.model import Dashboard, Panel, Row, Variable, View

WIDTH = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SCHEMA = 39


def render(dashboard: Dashboard) -> str:
    """Sorted and indented, so that a change of one panel is a change of a few lines."""
    document = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.text,
        "tags": ["esper"],
        "editable": False,
        "refresh": "30s",
        "schemaVersion": _SCHEMA,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource(), *(_variable(variable) for variable in dashboard.variables)]},
        "panels": list(_panels(dashboard.rows)),
    }
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def places(row: Row) -> Iterator[tuple[Panel, int, int]]:
    """Panels with their column and line below the row's title: left to right, then below."""
    column = line = deepest = 0
    for panel in row.panels:
        if column + panel.width > WIDTH:
            column, line, deepest = 0, line + deepest, 0
        yield panel, column, line
        column, deepest = column + panel.width, max(deepest, panel.height)


def _panels(rows: tuple[Row, ...]) -> Iterator[dict[str, Any]]:
    top, number = 0, 1
    for row in rows:
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
            "panels": [],
        }
        top, bottom, number = top + 1, top + 1, number + 1
        for panel, column, line in places(row):
            yield _panel(panel, number, column, top + line)
            bottom, number = max(bottom, top + line + panel.height), number + 1
        top = bottom


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    numbers = panel.view is View.NUMBER
    return {
        "id": number,
        "type": panel.view.value,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": (
            {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
            if numbers
            else {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
        ),
        "targets": [
            {"refId": chr(ord("A") + at), "expr": query.expr, "legendFormat": query.legend, "datasource": _SOURCE}
            for at, query in enumerate(panel.queries)
        ],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.bad_from is not None:
        steps.append({"color": "red", "value": panel.bad_from})
    found: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.view is View.GRAPH:
        found["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 20 if panel.stacked else 0,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "scaleDistribution": {"type": "log", "log": 10} if panel.log_scale else {"type": "linear"},
            "thresholdsStyle": {"mode": "off" if panel.bad_from is None else "dashed"},
        }
    return found


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(variable: Variable) -> dict[str, Any]:
    within = f"{variable.metric}{{{variable.matchers}}}" if variable.matchers else variable.metric
    query = f"label_values({within}, {variable.label})"
    return {
        "name": variable.name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": variable.name},
        "refresh": 2,
        "sort": 1,
    }
