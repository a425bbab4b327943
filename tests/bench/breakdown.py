"""Where each microsecond of a protected step goes, beside the same parts of the plain loop.

Both sides run with a clock around every part. A clock costs a fraction of a microsecond, the same on both sides; what
the parts do not add up to is the loop itself, and is shown as such, so that the column of differences sums to the
difference that was measured.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from esper_runtime.tolaria.loop import Parts
from esper_runtime.tolaria.state import TrainState

REST = "the loop itself"


class Clocks:
    """Nanoseconds by part. A part inside another one counts for the inner one alone."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = defaultdict(int)
        self._open: list[int] = []

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            self._open.append(0)
            began = perf_counter_ns()
            try:
                return call(*arguments, **options)
            finally:
                took = perf_counter_ns() - began
                self.spent[part] += took - self._open.pop()
                if self._open:
                    self._open[-1] += took

        return timed

    def take(self) -> dict[str, int]:
        spent, self.spent = self.spent, defaultdict(int)
        return spent


def watch(parts: Parts, state: TrainState, clocks: Clocks) -> None:
    """Puts clocks into a trainer that stands still."""
    step, update = parts.step, state.update
    places: tuple[tuple[Any, str, str], ...] = (
        (parts.control, "poll", "look for halts"),
        (state.loader, "take", "batch"),
        (step, "_loss", "forward and loss"),
        (step, "_backward", "backward"),
        (update, "prepare", "clear gradients"),
        (update, "collect", "gather gradients"),
        (update, "squared_norm", "finite check"),
        (state.judge, "check", "judge loss and norm"),
        (step._learning_rate, "apply", "learning rate"),
        (update, "apply", "optimizer"),
        (parts.heart, "progress", "heartbeat"),
        (parts.start, "after_step", "report of the start"),
        (parts.publisher, "after_step", "metrics and record"),
        (parts.rollbacks, "after_step", "follow verdicts"),
        (parts.memory, "after_step", "snapshot"),
        (parts.checkpoints, "after_step", "checkpoint due?"),
    )
    for owner, name, part in places:
        setattr(owner, name, clocks.around(part, getattr(owner, name)))


def table(esper: list[dict[str, int]], plain: list[dict[str, int]], whole: tuple[float, float], steps: int) -> str:
    """`whole`: measured microseconds per step of both sides, with clocks."""
    names = dict.fromkeys(name for spent in (*esper, *plain) for name in spent)
    lines = [f"    {'part':22} {'esper':>9} {'plain':>9} {'difference':>11}  µs per step, medians"]
    sums = [0.0, 0.0]
    for name in names:
        pair = [statistics.median(spent.get(name, 0) / steps / 1e3 for spent in side) for side in (esper, plain)]
        sums = [total + value for total, value in zip(sums, pair, strict=True)]
        lines.append(f"    {name:22} {pair[0]:9.2f} {pair[1]:9.2f} {pair[0] - pair[1]:+11.2f}")
    rest = [total - known for total, known in zip(whole, sums, strict=True)]
    lines.append(f"    {REST:22} {rest[0]:9.2f} {rest[1]:9.2f} {rest[0] - rest[1]:+11.2f}")
    lines.append(f"    {'measured':22} {whole[0]:9.2f} {whole[1]:9.2f} {whole[0] - whole[1]:+11.2f}")
    return "\n".join(lines)
