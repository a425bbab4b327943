"""What the drills showed, as a page."""

from collections.abc import Sequence
from typing import Final

from tests.drills.drill import Drill, End, Result, clock

_HEAD: Final = """\
# Drills

Real harm to a real run, and what the alerts of the chart made of it. `make drills` plays them all in about fifteen
minutes and writes this page; `make drills DRILL=hang` plays one. They need Debian's package `prometheus`.

Each drill has a run of its own on one machine: trainer, supervisor, sidecars and Redis as processes under `esper run`,
scraped by a real Prometheus with the rules of the chart.
{clock}

Every alert has to fire within a minute of the harm and to clear once it is mended. At the end the run must have trained
every step, no report and no telemetry may be lost, and its final state must have the bits of a run that nothing befell.

"""
_COLUMNS: Final = ("Drill", "Harm", "Alert", "Fires after", "Clears after", "Steps", "Lost", "Final state", "Measured")


def row(result: Result, end: End) -> list[list[str]]:
    """A line for each alert."""
    drill = result.drill
    steps = f"{end.steps - end.left_out} of {end.steps}" + (f", {end.left_out} left out as bad" if end.left_out else "")
    rest = [steps, f"none of {end.reports} reports", state(drill), "; ".join(result.notes)]
    lines = []
    for number, alert in enumerate(drill.alerts):
        seconds = [f"{result.fired_s[alert]:.1f} s", f"{result.cleared_s[alert]:.1f} s"]
        if alert in drill.threshold_s:
            seconds[0] += f" (it tells of an age over {drill.threshold_s[alert]:g} s)"
        mine = [drill.name, drill.harm] if number == 0 else ["", ""]
        lines.append([*mine, alert, *seconds, *(rest if number == 0 else [""] * len(rest))])
    return lines


def state(drill: Drill) -> str:
    return "same bits" if drill.same_end else f"another: {drill.why_other_end}"


def page(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    lines += [f"| {' | '.join(line)} |" for line in rows]
    return _HEAD.format(clock=clock()) + "\n".join(lines) + "\n"
