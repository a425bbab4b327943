"""What a rule, an objective and a panel are made of."""

from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    CRITICAL = "critical"
    """Somebody should come."""
    WARNING = "warning"
    """Somebody should look in the next hours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    name: str
    expr: str
    wait: str = "0s"
    """How long the condition must hold."""
    severity: Severity
    summary: str
    """One line; `{{ $labels.run }}` and the like are filled in by Prometheus."""
    value: str
    """The sentence with the current value."""
    action: str
    """What to do first."""
    cause: str
    """For the page: what it means, and how it comes about."""
    panel: str
    """Key of the panel that shows it: <dashboard>/<panel>."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """A series that Prometheus computes. `of` are the labels that it has beside those of `labels`."""

    record: str
    expr: str
    labels: dict[str, str] = field(default_factory=dict)
    of: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """Good events of all events; both are counters, written with `$window` for their range."""

    name: str
    text: str
    objective: float
    good: str
    total: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Rules that are evaluated together, in this order."""

    name: str
    interval: str
    recordings: tuple[Recording, ...] = ()
    alerts: tuple[Alert, ...] = ()


class View(StrEnum):
    """How Grafana draws a panel."""

    GRAPH = "timeseries"
    NUMBER = "stat"


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    key: str
    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    """Of Grafana: ms, s, bytes, percentunit, short."""
    view: View = View.GRAPH
    width: int = 8
    """Of 24."""
    height: int = 7
    stacked: bool = False
    bad_from: float | None = None
    """Red from here on."""
    log_scale: bool = False
    text: str = ""
    expected_empty: str = ""
    """Why a healthy run on an ordinary machine shows nothing here; empty: it must show something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """A choice above the dashboard."""

    name: str
    metric: str
    """Whose label values are offered."""
    label: str
    matchers: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dashboard:
    uid: str
    title: str
    text: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)
