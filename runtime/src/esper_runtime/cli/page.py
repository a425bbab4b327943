"""The report as one HTML page: nothing is fetched, nothing runs. The loss curve is drawn as SVG with rollback marks."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from esper_runtime.cli.output import clock_time
from esper_runtime.cli.report import death_rows, epoch_rows, facts, metric_names, percent, phases, recovery_rows
from esper_runtime.cli.story import Point, Story

WIDTH, HEIGHT = 900, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 18, 34
MAX_POINTS = 2000
MAX_MARKS = 200
MAX_TABLE = 500
DEATHS = ("Time", "Reason", "Exit", "Step", "How", "Stacks")
RECOVERIES = ("Time", "Recovery", "Cause", "Tier", "From step", "To step", "Detected", "Recovered")
_LOGARITHMIC_FROM = 20.0
"""Largest over smallest loss from which the scale is logarithmic."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #8a8a8a; --line: #ddd; --train: #2266bb;
        --held: #d07000; --mark: #c02020; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --faint: #8d939c; --line: #363a42;
        --train: #6aa8f0; --held: #f0a850; --mark: #ff6b6b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 960px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.15rem 1rem 0.15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--faint); } .wide { overflow-x: auto; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 11px; }
.axis { stroke: var(--line); } .train { stroke: var(--train); } .held { stroke: var(--held); }
.train, .held, .undone { fill: none; stroke-width: 1.5; } .undone { stroke: var(--faint); stroke-dasharray: 3 3; }
.mark line { stroke: var(--mark); stroke-dasharray: 2 3; } .mark circle { fill: var(--mark); }
"""


def page(name: str, story: Story) -> str:
    """The whole document."""
    parts = [
        f"<h1>Run {escape(name)}</h1>",
        _table(facts(name, story), ()),
        "<h2>Loss</h2>",
        curve(story),
    ]
    if story.moves:
        rows = [[n, f"{s:.1f}", percent(share), str(count)] for n, s, share, count in phases(story)]
        parts += ["<h2>Phases</h2>", _table(rows, ("Phase", "Seconds", "Share", "Times"))]
    if story.deaths:
        parts += ["<h2>Failures of the trainer</h2>", _table(death_rows(story), DEATHS)]
    if story.backs:
        parts += ["<h2>Rollbacks and recoveries</h2>", _table(recovery_rows(story), RECOVERIES)]
    if story.epochs:
        names = metric_names(story.epochs)
        columns = ("Epoch", "Step", *(n.replace("_", " ") for n in names), "Samples/s")
        parts += ["<h2>Epochs</h2>", _table(epoch_rows(story.epochs, names), columns)]
    if story.moves:
        rows = [[clock_time(m.time), m.before, m.after, m.reason, str(m.attempt), str(m.step)] for m in story.moves]
        parts += ["<h2>History</h2>", _table(rows, ("Time", "From", "To", "Reason", "Attempt", "Step"))]
    if story.troubles:
        rows = [[event, str(count)] for event, count in story.troubles.most_common()]
        parts += ["<h2>Warnings and errors</h2>", _table(rows, ("Event", "Count"))]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    head = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>" if header else ""
    shown = rows if len(rows) <= MAX_TABLE else rows[-MAX_TABLE:]
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in shown)
    more = f"<p>The last {MAX_TABLE} of {len(rows)}.</p>" if len(rows) > MAX_TABLE else ""
    return f'<div class="wide"><table>{head}{body}</table></div>{more}'


# The curve


class Scale:
    """Steps and losses to places on the drawing. Logarithmic where losses span much and are positive."""

    def __init__(self, steps: Iterable[int], losses: Iterable[float]) -> None:
        known = sorted(losses)
        self.first, self.last = 0, max(1, *steps, 1)
        self.logarithmic = known[0] > 0 and known[-1] / known[0] >= _LOGARITHMIC_FROM
        self.low, self.high = self._of(known[0]), self._of(known[-1])
        if self.high - self.low < 1e-9:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def _of(self, loss: float) -> float:
        return math.log10(loss) if self.logarithmic else loss

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - self.first) / (self.last - self.first)

    def y(self, loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - self._of(loss)) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Losses to name on the axis."""
        found = [self.low + (self.high - self.low) * part / 4 for part in range(5)]
        return [10**value for value in found] if self.logarithmic else found


def curve(story: Story) -> str:
    """Training loss (undone parts dashed), validation loss, and a mark for each rollback and restart."""
    held = [
        (epoch.step, epoch.metrics["validation_loss"]) for epoch in story.epochs if "validation_loss" in epoch.metrics
    ]
    if not story.points and not held:
        return "<p>The record holds no loss yet.</p>"
    scale = Scale(
        [point.step for point in story.points] + [step for step, _ in held] + [back.from_step for back in story.backs],
        [point.loss for point in story.points] + [loss for _, loss in held],
    )
    parts = [_axes(scale)]
    for run in _runs(_thinned(story.points)):
        kind = "train" if run[-1].kept else "undone"
        parts.append(_line(kind, [(scale.x(point.step), scale.y(point.loss)) for point in run]))
    if held:
        parts.append(_line("held", [(scale.x(step), scale.y(loss)) for step, loss in held]))
    for back in story.backs[-MAX_MARKS:]:
        said = f"{back.kind} after {back.cause}: step {back.from_step} to {back.to_step} in {back.recover_ms:.1f} ms"
        x = f"{scale.x(back.from_step):.1f}"
        parts.append(
            f'<g class="mark"><title>{escape(said)}</title>'
            f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/><circle cx="{x}" cy="{TOP}" r="4"/></g>'
        )
    legend = "training loss" + (", validation loss (orange)" if held else "") + ", rollbacks and restarts (red)"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss over steps">{"".join(parts)}</svg>'
        f"<p>{legend}; dashed grey is what a rollback undid{'; logarithmic' if scale.logarithmic else ''}.</p>"
    )


def _axes(scale: Scale) -> str:
    parts = []
    for loss in scale.ticks():
        y = scale.y(loss)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
    for part in range(5):
        step = scale.first + (scale.last - scale.first) * part / 4
        place = f'x="{scale.x(step):.1f}" y="{HEIGHT - BOTTOM + 18}"'
        parts.append(f'<text {place} text-anchor="middle">{step:.0f}</text>')
    return "".join(parts)


def _line(kind: str, places: list[tuple[float, float]]) -> str:
    if len(places) == 1:
        ((x, y),) = places
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>'
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """Points that belong together: of one course, and all kept or all undone. The next one begins where one ends."""
    runs: list[list[Point]] = []
    for point in points:
        last = runs[-1][-1] if runs else None
        if last is not None and last.course == point.course:
            if last.kept == point.kept:
                runs[-1].append(point)
            else:
                runs.append([last, point])
        else:
            runs.append([point])
    return runs


def _thinned(points: list[Point]) -> list[Point]:
    every = -(-len(points) // MAX_POINTS)
    return points if every <= 1 else [*points[::every], points[-1]]
