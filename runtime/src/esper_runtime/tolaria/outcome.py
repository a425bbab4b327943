"""How a training process ends: a value that the last word, the journal and the exit code are made of."""

from dataclasses import dataclass

from esper_leyline.exitcodes import ExitCode
from esper_leyline.reasons import RunReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    exit_code: ExitCode
    reason: RunReason
    message: str = ""
    saved_step: int | None = None
    """Step of the checkpoint that this end saved; None when it saved none."""
