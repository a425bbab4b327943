"""A run in progress: a table that stays in place on a terminal, one line per transition anywhere else."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from esper_runtime.cli.output import COLUMNS, WIDE_COLUMNS, cells, clock_time, find, history_cells

Resource = Mapping[str, Any]

PROGRESS_EVERY_S = 5.0
"""Least time between two progress lines."""
RECENT = 8
"""Transitions below the table."""


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


def view(stream: TextIO) -> View:
    """The table when `stream` is a terminal, else lines."""
    return Table(stream) if stream.isatty() else Lines(stream)


class Lines:
    """One line per transition, and one for progress every few seconds."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._history: list[Mapping[str, Any]] = []
        self._first = True
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
        # What was before this command is shown by `esper status`.
        for entry in () if self._first and len(history) > len(fresh) else fresh:
            self.note(transition_line(entry))
        self._first = False
        now = self._clock()
        step = find(resource, "status", "progress", "step")
        if step is not None and step != self._step and now - self._progress_at >= PROGRESS_EVERY_S:
            self._step, self._progress_at = step, now
            self.note(progress_line(resource))


def news(before: list[Mapping[str, Any]], after: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Entries of a bounded history that were not there before."""
    for known in range(min(len(before), len(after)), 0, -1):
        if before[-known:] == after[:known]:
            return after[known:]
    return list(after)


def transition_line(entry: Mapping[str, Any]) -> str:
    time_, from_, to, reason, attempt, step = history_cells(entry)
    change = f"{from_} -> {to}" if from_ else to
    facts = ", ".join(
        text for text in (reason, attempt and f"attempt {attempt}", step and f"step {step}") if text
    )  # fmt: skip
    return f"{time_}  {change}  ({facts})" if facts else f"{time_}  {change}"


def progress_line(resource: Resource) -> str:
    progress = find(resource, "status", "progress") or {}
    total = progress.get("totalSteps")
    parts = [
        f"epoch {progress.get('epoch', 0)}",
        f"step {progress.get('step', 0)}" + (f"/{total}" if total else ""),
        *([f"{progress['percentage']}%"] if progress.get("percentage") is not None else []),
        *([f"loss {progress['loss']}"] if progress.get("loss") is not None else []),
    ]
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return f"{clock_time(at)}  {find(resource, 'status', 'phase') or ''}  {', '.join(parts)}"


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
        row = cells(self._resource, wide=True, now=datetime.now(UTC))
        grid = RichTable(box=None, pad_edge=False, header_style="bold")
        shown = [*COLUMNS, *WIDE_COLUMNS[:2]]
        for column in shown:
            grid.add_column(column, no_wrap=True)
        grid.add_row(*(Text(cell, style=_style(column, cell)) for column, cell in zip(shown, row, strict=False)))
        history = (find(self._resource, "status", "history") or [])[-RECENT:]
        lines = [Text("  " + transition_line(entry), style="dim") for entry in history]
        return Group(grid, *lines)


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
