"""A run in progress: a table that stays in place on a terminal, one line per transition anywhere else."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol, Self, TextIO, cast

from esper_leyline.phases import Phase

from esper_runtime.cli.output import (
    COLUMNS,
    WIDE_COLUMNS,
    Unbroken,
    cells,
    clock_time,
    duration,
    find,
    fitting,
    history_cells,
)

Resource = Mapping[str, Any]
History = Sequence[Mapping[str, Any]]

PROGRESS_EVERY_S = 5.0
"""Least time between two progress lines."""
RECENT = 8
"""Transitions below the table."""
SHOWN = (*COLUMNS, *WIDE_COLUMNS[:2])
"""Columns of the table."""
_GAP = 2


class View(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, resource: Resource) -> None:
        """The run changed."""
        ...

    def note(self, text: str) -> None:
        """Something else worth a line."""
        ...


def view(stream: TextIO, *, known: History = ()) -> View:
    """The table when `stream` is a terminal, else lines; those leave out the transitions that are `known`."""
    unbroken = cast(TextIO, Unbroken(stream))
    return Table(unbroken) if stream.isatty() else Lines(unbroken, known=known)


class Lines:
    """One line per transition, and one for progress every few seconds."""

    def __init__(self, stream: TextIO, *, known: History = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._history = list(known)
        self._progress_at = float("-inf")
        self._step: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def update(self, resource: Resource) -> None:
        history = find(resource, "status", "history") or []
        fresh = news(self._history, history)
        self._history = list(history)
        for entry in fresh:
            self.note(transition_line(entry))
        now = self._clock()
        step = find(resource, "status", "progress", "step")
        if step and step != self._step and now - self._progress_at >= PROGRESS_EVERY_S:
            self._step, self._progress_at = step, now
            self.note(progress_line(resource))


def news(before: History, after: History) -> History:
    """Entries of a bounded history that were not there before."""
    for known in range(min(len(before), len(after)), 0, -1):
        if list(before[-known:]) == list(after[:known]):
            return after[known:]
    return after


def transition_line(entry: Mapping[str, Any]) -> str:
    time_, from_, to, reason, attempt, step = history_cells(entry)
    change = f"{from_} -> {to}" if from_ else to
    facts = [reason, attempt and f"attempt {attempt}", step != "0" and step and f"step {step}"]
    said = ", ".join(fact for fact in facts if fact)
    return f"{time_:12}  {change}  ({said})" if said else f"{time_:12}  {change}"


def progress_line(resource: Resource) -> str:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return f"{clock_time(at):12}  {find(resource, 'status', 'phase') or ''}  {progress(resource)}"


def progress(resource: Resource) -> str:
    """How far training is, in words."""
    found = find(resource, "status", "progress") or {}

    def of(value: str, total: str) -> str:
        return f"{found.get(value, 0)}" + (f"/{found[total]}" if found.get(total) else "")

    parts = [f"epoch {of('epoch', 'totalEpochs')}", f"step {of('step', 'totalSteps')}"]
    if found.get("percentage") is not None:
        parts[-1] += f" ({found['percentage']}%)"
    if found.get("loss") is not None:
        parts.append(f"loss {found['loss']}")
    parts += [f"{m['name']} {m['value']}" for m in found.get("metrics", ()) if m["name"] not in _SAID_BY_LOSS]
    if (left := found.get("estimatedRemainingSeconds")) and find(resource, "status", "phase") == Phase.RUNNING:
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)


_SAID_BY_LOSS = ("train_loss", "validation_loss")


class Table:
    """kubectl's wide columns in one row that is rewritten, with the latest transitions below."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._resource: Resource | None = None
        self._notes: list[str] = []
        self._live = Live(
            console=Console(file=stream), get_renderable=self._render, refresh_per_second=4, transient=False
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, resource: Resource) -> None:
        self._resource = resource

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def _render(self) -> Any:
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        if self._resource is None:
            return Text("starting ...")
        found = dict(zip(SHOWN, cells(self._resource, wide=True, now=datetime.now(UTC)), strict=False))
        grid = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
        shown = fitting(found, self._live.console.width, gap=_GAP)
        for column in shown:
            grid.add_column(column, no_wrap=True)
        grid.add_row(*(Text(cell, style=_style(column, cell)) for column, cell in shown.items()))
        history = (find(self._resource, "status", "history") or [])[-RECENT:]
        lines = [progress(self._resource), "", *(transition_line(entry) for entry in history)]
        return Group(grid, *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines))


_STYLES = {
    "Running": "green",
    "Succeeded": "bold green",
    "Failed": "bold red",
    "Halted": "yellow",
    "Halting": "yellow",
    "RollingBack": "magenta",
    "Restarting": "magenta",
}


def _style(column: str, cell: str) -> str:
    return _STYLES.get(cell, "") if column == "PHASE" else ""
