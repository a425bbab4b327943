"""How resources are shown: kubectl's columns, JSON, YAML, names. Results go to standard output, all else to stderr."""

import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TextIO

from esper_leyline import labels
from esper_leyline.phases import Phase

Resource = Mapping[str, Any]


class Format(StrEnum):
    """-o"""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


COLUMNS = ("NAME", "PHASE", "EPOCH", "STEP", "PROGRESS", "ATTEMPT", "ROLLBACKS", "READY", "AGE")
"""Those of `kubectl get esperruns`."""
WIDE_COLUMNS = ("LOSS", "CHECKPOINT", "RESTARTS", "REASON", "QUEUE")
EXPENDABLE = (
    "QUEUE", "READY", "AGE", "CHECKPOINT", "EPOCH", "REASON", "LOSS", "ATTEMPT", "RESTARTS", "ROLLBACKS", "PROGRESS",
    "STEP",
)  # fmt: skip
"""Columns that a narrow terminal goes without, the first one first."""
GAP = 3
"""Blanks between columns."""
_NOBODY_READS = (errno.EPIPE, errno.EIO)
"""Errors of writing to a pipe or a terminal whose other end is gone."""


def say(text: str) -> None:
    """For people: progress, warnings, errors."""
    print(text, file=Unbroken(sys.stderr), flush=True)


def width_of(stream: TextIO) -> int | None:
    """Columns of a terminal; None for anything else."""
    if not stream.isatty():
        return None
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if asked.isdigit() else os.get_terminal_size(stream.fileno()).columns or None


class Unbroken(io.TextIOBase):
    """A text stream that goes silent when its reader goes away: a closed terminal does not end a training."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._tolerant():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._tolerant():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NOBODY_READS:
                raise


def find(resource: Any, *path: str) -> Any:
    """The value at a path of keys; None where there is none."""
    for key in path:
        if not isinstance(resource, Mapping):
            return None
        resource = resource.get(key)
    return resource


def cells(resource: Resource, *, wide: bool, now: datetime) -> list[str]:
    """One row, in the order of COLUMNS and, when `wide`, WIDE_COLUMNS. Absent values are empty, as in kubectl."""
    status = resource.get("status") or {}
    values = [
        find(resource, "metadata", "name"),
        find(status, "phase"),
        find(status, "progress", "epoch"),
        find(status, "progress", "step"),
        find(status, "progress", "percentage"),
        find(status, "attempt"),
        find(status, "rollbacks", "total"),
        find(status, "ranks", "summary"),
        age(find(resource, "metadata", "creationTimestamp"), now=now),
    ]
    if wide:
        values += [
            find(status, "progress", "loss"),
            find(status, "checkpoint", "latestVerifiedStep"),
            find(status, "restarts", "total"),
            find(status, "reason"),
            find(resource, "spec", "scheduling", "queueName"),
        ]
    return ["" if value is None else str(value) for value in values]


def age(timestamp: str | None, *, now: datetime) -> str:
    """How long ago, in kubectl's words: 45s, 3m20s, 12m, 5h, 9d."""
    if timestamp is None:
        return ""
    return duration(max(0, int((now - datetime.fromisoformat(timestamp)).total_seconds())))


def duration(seconds: int) -> str:
    """In kubectl's words."""
    if seconds < 120:
        return f"{seconds}s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if minutes < 10:
        rest = seconds % 60
        return f"{minutes}m{rest}s" if rest else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    return f"{hours}h" if hours < 48 else f"{days}d"


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Left-aligned columns, GAP spaces apart, no trailing blanks."""
    lines = [list(header), *([_plain(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join((" " * GAP).join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def _plain(cell: str) -> str:
    """Without what would move the cursor or more: a cell may come from a stranger, by Redis."""
    return (
        cell
        if cell.isprintable()
        else "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in cell)
    )


def fitting(row: Mapping[str, str], width: int, *, gap: int) -> dict[str, str]:
    """The columns of `row` (header -> cell) that have room side by side."""
    shown = dict(row)
    for column in EXPENDABLE:
        if sum(max(len(head), len(cell)) + gap for head, cell in shown.items()) - gap <= width:
            break
        shown.pop(column, None)
    return shown


def show(resources: Sequence[Resource], form: Format, *, single: bool = False, namespaces: bool = False) -> str:
    """The text for standard output. `single` shows the only resource itself instead of a List."""
    if form is Format.NAME:
        return "\n".join(f"{labels.SINGULAR}.{labels.GROUP}/{find(r, 'metadata', 'name')}" for r in resources)
    if form in (Format.JSON, Format.YAML):
        return document(resources[0] if single else as_list(resources), form)
    now = datetime.now(UTC)
    wide = form is Format.WIDE
    header = [*COLUMNS, *(WIDE_COLUMNS if wide else ())]
    rows = [cells(resource, wide=wide, now=now) for resource in resources]
    if namespaces:
        header = ["NAMESPACE", *header]
        rows = [[find(r, "metadata", "namespace") or "", *row] for r, row in zip(resources, rows, strict=True)]
    return table(rows, header)


def as_list(resources: Sequence[Resource]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "List", "items": list(resources), "metadata": {}}


def document(value: Any, form: Format) -> str:
    """JSON or YAML."""
    if form is Format.JSON:
        return json.dumps(value, indent=2, ensure_ascii=False)
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)).rstrip("\n")


def describe(resource: Resource, *, conditions: bool = True, width: int | None = None) -> str:
    """A run for people: its row, cut to `width` by leaving out columns, what is the matter, conditions, history."""
    status = resource.get("status") or {}
    row = dict(zip((*COLUMNS, *WIDE_COLUMNS), cells(resource, wide=True, now=datetime.now(UTC)), strict=True))
    if width is not None:
        row = fitting(row, width, gap=GAP)
    blocks = [table([list(row.values())], list(row))]
    if facts := _facts(status):
        blocks.append("\n".join(facts))
    if conditions and (found := status.get("conditions")):
        rows = [[c["type"], c["status"], c.get("reason", ""), _one_line(c.get("message", ""))] for c in found]
        blocks.append(table(rows, ("CONDITION", "STATUS", "REASON", "MESSAGE")))
    if history := status.get("history"):
        rows = [history_cells(entry) for entry in history]
        blocks.append(table(rows, ("TIME", "FROM", "TO", "REASON", "ATTEMPT", "STEP")))
    return "\n\n".join(blocks)


def history_cells(entry: Resource) -> list[str]:
    """Of one entry of status.history."""
    return [
        clock_time(entry.get("time")),
        entry.get("from") or "",
        entry.get("to") or "",
        entry.get("reason") or "",
        *("" if entry.get(key) is None else str(entry[key]) for key in ("attempt", "step")),
    ]


def clock_time(timestamp: str | None) -> str:
    """Local time of day with milliseconds where there are any."""
    if timestamp is None:
        return ""
    at = datetime.fromisoformat(timestamp).astimezone()
    return at.strftime("%H:%M:%S") + (f".{at.microsecond // 1000:03d}" if at.microsecond else "")


def _facts(status: Resource) -> list[str]:
    facts: list[str] = []
    if halt := status.get("halt"):
        head = "Halt" if status.get("phase") in (Phase.HALTING, Phase.HALTED) else "Last halt"
        text = f"{head}: {halt['mode']} by {halt['source']}, {halt.get('acknowledged', 0)}/{halt.get('expected', 0)}"
        text += " acknowledged"
        if halt.get("milliseconds") is not None:
            text += f" in {halt['milliseconds']} ms"
        if halt.get("savedStep") is not None:
            text += f", saved step {halt['savedStep']}"
        facts.append(text)
    if recovery := status.get("lastRecovery"):
        facts.append(
            f"Last recovery: {recovery['kind']} after {recovery.get('cause', '')}, step {recovery.get('fromStep')} -> "
            f"{recovery.get('toStep')} in {recovery.get('recoverMilliseconds')} ms"
        )
    if failure := status.get("lastFailure"):
        where = f"pod {failure.get('podName')}, container {failure.get('containerName')}"
        said = _one_line(failure.get("message", ""))
        facts.append(
            f"Last failure: {failure.get('reason', '')}, {where}, exit code {failure.get('exitCode')}"
            + (f": {said}" if said else "")
        )
    if metrics := find(status, "progress", "metrics"):
        facts.append("Metrics: " + ", ".join(f"{m['name']} {m['value']}" for m in metrics))
    if export := find(status, "checkpoint", "exportPath"):
        facts.append(f"Exported model: {export} (esper fetch brings it home)")
    return facts


def _one_line(text: str, limit: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."
