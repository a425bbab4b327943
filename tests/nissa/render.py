"""Pictures of the dashboards with what a real Prometheus has of a real run and a real operator.

python -m tests.nissa.render docs/images         # through scripts/dashboards

A run on this machine goes through the faults of `scene`; the operator works on a real API server (KUBE_ASSETS) with
simulated pods meanwhile. matplotlib draws the grid that Grafana would: same places, titles, lines and limits.
"""

import argparse
import asyncio
import contextlib
import math
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from esper_operator.api import crd
from esper_runtime.nissa.dashboards import DASHBOARDS
from esper_runtime.nissa.grafana import WIDTH, places
from esper_runtime.nissa.model import Dashboard, Panel, View
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from tests.apiserver.operators import Cluster, cluster
from tests.nissa import scene
from tests.support.controlplane import running
from tests.support.localruns import Laptop, Resource, paced, spec_of
from tests.support.prometheus import Prometheus, free_port

CELL_IN = (0.62, 0.36)
DPI = 72
LINES = 8
"""In a panel's legend; the rest are drawn without words."""
_RED, _INK, _GREY = "#c4162a", "#1f2933", "#8a94a0"
_FACTORS = {"percentunit": (100.0, " %"), "bytes": (1 / 2**20, " MiB"), "s": (1.0, " s"), "ms": (1.0, " ms")}
_UNKNOWN = re.compile(r"\{\{\w+\}\}|\bto\b(?= \{)")
"""What is left of a legend when a series has not the label."""


class Drawing:
    def __init__(self, server: Prometheus, run: str, start: float, end: float) -> None:
        self._server = server
        self._run = run
        self._start, self._end = start, end

    def save(self, dashboard: Dashboard, path: Path) -> None:
        height = sum(1 + max(line + panel.height for panel, _, line in places(row)) for row in dashboard.rows)
        figure = pyplot.figure(figsize=(WIDTH * CELL_IN[0], (height + 2) * CELL_IN[1]), facecolor="#f4f5f7")
        figure.text(0.008, 1 - 1.2 / (height + 2), dashboard.title, size=15, weight="bold", color=_INK)
        top = 2.0
        for row in dashboard.rows:
            figure.text(0.008, 1 - (top + 0.75) / (height + 2), row.title, size=10.5, weight="bold", color=_INK)
            top += 1
            for panel, column, line in places(row):
                left, low = (column + 0.95) / WIDTH, 1 - (top + line + panel.height - 1.1) / (height + 2)
                size = (panel.width - 1.25) / WIDTH, (panel.height - 2.5) / (height + 2)
                self._panel(figure.add_axes((left, low, *size)), panel)
            top += max(line + panel.height for panel, _, line in places(row))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
        pyplot.close(figure)

    def _panel(self, axes: Axes, panel: Panel) -> None:
        axes.set_title(panel.title, size=8.5, loc="left", color=_INK, pad=3)
        axes.tick_params(labelsize=6.5, colors=_GREY, length=2)
        for spine in axes.spines.values():
            spine.set_color("#d8dce1")
        drawn = self._lines(panel)
        if panel.view is View.NUMBER:
            _number(axes, panel, drawn)
        elif drawn:
            self._graph(axes, panel, drawn)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
            words = panel.expected_empty or "no data"
            axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", size=7, color=_GREY)

    def _lines(self, panel: Panel) -> list[tuple[str, list[float], list[float]]]:
        """(legend, seconds, values) of every series."""
        factor, _ = _FACTORS.get(panel.unit, (1.0, ""))
        found = []
        for query in panel.queries:
            for each in scene.values(self._server, query, self._run, start=self._start, end=self._end):
                legend = query.legend
                for name, value in each["metric"].items():
                    legend = legend.replace(f"{{{{{name}}}}}", value)
                legend = _UNKNOWN.sub("", legend).strip(" :") or "none yet"
                points = [(float(at) - self._start, float(value) * factor) for at, value in each["values"]]
                found.append((legend, [at for at, _ in points], [value for _, value in points]))
        return found

    def _graph(self, axes: Axes, panel: Panel, drawn: Sequence[tuple[str, list[float], list[float]]]) -> None:
        if panel.stacked:
            at = sorted({moment for _, moments, _ in drawn for moment in moments})
            heights = []
            for _, moments, numbers in drawn:
                known = dict(zip(moments, numbers, strict=True))
                heights.append([value if math.isfinite(value := known.get(moment, 0.0)) else 0.0 for moment in at])
            axes.stackplot(at, heights, labels=[legend for legend, _, _ in drawn], alpha=0.7, linewidth=0)
        else:
            for number, (legend, moments, numbers) in enumerate(drawn):
                axes.plot(moments, numbers, linewidth=1.1, label=legend if number < LINES else "_")
        if panel.log_scale:
            axes.set_yscale("log")
        if panel.bad_from is not None:
            axes.axhline(panel.bad_from, color=_RED, linewidth=0.8, linestyle="--")
        axes.set_xlim(0, self._end - self._start)
        lowest = min((value for _, _, numbers in drawn for value in numbers if math.isfinite(value)), default=0.0)
        if not panel.log_scale and lowest >= 0:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_minor_formatter(NullFormatter())
        _, unit = _FACTORS.get(panel.unit, (1.0, ""))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
        axes.grid(True, color="#e6e9ed", linewidth=0.6)
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.13), ncols=max(2, panel.width // 2 - 1), fontsize=6,
            frameon=False, columnspacing=1.0,
            handlelength=1.0, labelcolor=_INK, borderpad=0.0,
        )  # fmt: skip


def _number(axes: Axes, panel: Panel, drawn: Sequence[tuple[str, list[float], list[float]]]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if not drawn:
        return
    _, moments, numbers = drawn[0]
    last = next(value for value in reversed(numbers) if math.isfinite(value))
    factor, unit = _FACTORS.get(panel.unit, (1.0, ""))
    bad = panel.bad_from is not None and last >= panel.bad_from * factor
    axes.fill_between(moments, numbers, color=_RED if bad else "#5794f2", alpha=0.18, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.text(
        0.5, 0.5, f"{last:.4g}{unit}", transform=axes.transAxes, ha="center", va="center", size=17,
        color=_RED if bad else _INK,
    )  # fmt: skip


def manifest() -> list[Resource]:
    """A run that leaves the processor to others, has something to learn, and meets two faults."""
    documents = paced(name="demo")
    code = documents[0]["data"]
    flat = "labels = torch.randint(2, (len(inputs),), generator=random)"
    assert flat in code["paced.py"]
    code["paced.py"] = code["paced.py"].replace(flat, "labels = (inputs[:, 0] > inputs[:, 1]).long()")
    code["paced.py"] = code["paced.py"].replace("lr=1e-4", "lr=2e-3")
    spec_of(documents)["faultInjection"] = [
        {"kind": "NonFiniteLoss", "step": 300},
        {"kind": "KillTrainer", "step": 700},
    ]
    return documents


async def operate(colony: Cluster, until: asyncio.Event) -> None:
    """Runs of the simulated node: one that rolls back, one that is stopped, one that crashes, and so on and on."""
    number = 0
    while not until.is_set():
        number += 1
        colony.create_run(f"rolled-{number}", steps=120, nan_at=30)
        colony.create_run(f"stopped-{number}", steps=150)
        await colony.stepped(f"stopped-{number}", 40)
        colony.set_spec(f"stopped-{number}", emergencyStop="Freeze")
        await colony.phase(f"stopped-{number}", "Halted")
        await asyncio.sleep(4)
        colony.set_spec(f"stopped-{number}", emergencyStop="None")
        await colony.phase(f"rolled-{number}", "Succeeded")


async def draw(out: Path) -> None:
    with contextlib.ExitStack() as stack:
        directories = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(4)]
        plane = stack.enter_context(running(directories[0], controllers=True))
        server = stack.enter_context(scene.prometheus(directories[1], free_port()))
        laptop = Laptop(directories[2], manifest())
        stack.callback(laptop.close)
        plane.install_crd(crd.manifest())
        async with cluster(plane, directories[3]) as colony:
            await colony.leading_operator()
            operator = (colony.operator.port, {"namespace": "esper-system", "pod": colony.operator.name})
            ended = asyncio.Event()
            others: Any = asyncio.create_task(operate(colony, ended))
            await asyncio.to_thread(scene.live_through_faults, laptop, server, [operator])
            ended.set()
            await others
            start = scene.first_moment(server, laptop.name)
            drawing = Drawing(server, laptop.name, start, time.time())
            for name, dashboard in DASHBOARDS.items():
                drawing.save(dashboard, out / f"dashboard-{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    mpl.use("Agg")
    asyncio.run(draw(parser.parse_args().out))


if __name__ == "__main__":
    main()
