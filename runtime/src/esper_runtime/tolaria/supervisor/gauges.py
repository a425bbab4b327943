"""The supervisor's /metrics: its own figures, then the trainer's as the trainer last wrote them."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

MAX_TRAINER_BYTES = 256 * 1024

Sample = tuple[str, str, str, float]
"""Name without its prefix, kind, text, value."""


def render(samples: Sequence[Sample], trainer_file: Path) -> str:
    """Prometheus text."""
    lines = (
        f"# HELP esper_tolaria_{name} {text}.\n# TYPE esper_tolaria_{name} {kind}\nesper_tolaria_{name} {value:g}\n"
        for name, kind, text, value in samples
    )
    return "".join(lines) + _of_trainer(trainer_file)


def _of_trainer(path: Path) -> str:
    """Whole lines, at most MAX_TRAINER_BYTES; nothing without a file."""
    with suppress(OSError), path.open("rb") as file:
        read = file.read(MAX_TRAINER_BYTES)
        return read[: read.rfind(b"\n") + 1].decode("utf-8", "replace")
    return ""
