"""What the death of a trainer means and what follows. Pure: no clock, no process, no file."""

import signal
from dataclasses import dataclass, replace

from esper_leyline.exitcodes import ExitCode
from esper_leyline.reasons import RunReason

FRUITLESS_LIMIT = 3
"""Starts in a row without a new step that end the container."""
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
RECREATE = "Recreate"
"""restart.strategy that wants a new pod for every failure."""

FINAL_CODES = frozenset(
    {
        ExitCode.COMPLETE,
        ExitCode.USER_CODE,
        ExitCode.NO_VALID_CHECKPOINT,
        ExitCode.ROLLBACK_EXHAUSTED,
        ExitCode.CHECKPOINT_DIR,
        ExitCode.HALTED,
        ExitCode.CONFIG,
        ExitCode.DRAINED,
    }
)
"""What the trainer exits with when it means it: no restart in place would change anything."""

FINAL_REASONS = {
    ExitCode.COMPLETE: RunReason.COMPLETE,
    ExitCode.TRAINER_CRASHED: RunReason.RESTARTS_EXHAUSTED,
    ExitCode.USER_CODE: RunReason.USER_CODE_ERROR,
    ExitCode.NO_VALID_CHECKPOINT: RunReason.NO_VALID_CHECKPOINT,
    ExitCode.ROLLBACK_EXHAUSTED: RunReason.ROLLBACKS_EXHAUSTED,
    ExitCode.CHECKPOINT_DIR: RunReason.CHECKPOINT_DIR_UNUSABLE,
    ExitCode.HALTED: RunReason.HALTED,
    ExitCode.HUNG: RunReason.HANG,
    ExitCode.CONFIG: RunReason.CONFIG_ERROR,
    ExitCode.DRAINED: RunReason.DRAINED,
}
"""Reason of an exit whose trainer left no last word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """How one trainer process ended, or why there is none."""

    status: int | None
    """Its exit code, or minus the signal's number; None when the system refused to start it."""
    refusal: str = ""
    """What the system said to that."""
    step: int | None = None
    """Last step in its heartbeats; None when it never beat."""
    phase: int | None = None
    """RuntimePhase of its last heartbeat."""
    hung: bool = False
    """The supervisor killed it because it hung."""
    out_of_memory: bool = False
    """The kernel's count of processes killed for memory rose while it lived."""

    @property
    def refused(self) -> bool:
        """There was no process."""
        return self.status is None

    @property
    def exit_code(self) -> int:
        """As a container reports it: 128 + signal. 0 when there was no process."""
        if self.status is None:
            return 0
        return self.status if self.status >= 0 else 128 - self.status

    @property
    def cause(self) -> RunReason:
        if self.hung:
            return RunReason.HANG
        if self.status == -signal.SIGKILL:
            return RunReason.OUT_OF_MEMORY if self.out_of_memory else RunReason.TRAINER_KILLED
        if self.status in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
            return RunReason.TRAINER_KILLED
        return RunReason.TRAINER_CRASHED

    @property
    def words(self) -> str:
        """For people."""
        if self.status is None:
            return f"trainer could not be started: {self.refusal}"
        if self.status >= 0:
            return f"trainer exited with {self.status}"
        try:
            name = signal.Signals(-self.status).name
        except ValueError:
            name = f"signal {-self.status}"
        why = " (out of memory)" if self.out_of_memory else " (hung)" if self.hung else ""
        return f"trainer was ended by {name}{why}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    """Start the trainer again after `delay_s`."""

    cause: RunReason
    delay_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """End the container with `exit_code`."""

    exit_code: int
    reason: RunReason
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartPolicy:
    """Decides about deaths one after the other; each decision gives the policy for the next one."""

    strategy: str = "Auto"
    fruitless: int = 0
    """Deaths in a row of trainers that got no further than one before them."""
    highest_step: int = -1
    """The furthest any trainer of this container got."""

    def after(self, death: Death) -> "tuple[RestartPolicy, Restart | End]":
        """The first death is answered at once, further ones without a new step with a growing delay, then the end."""
        if death.status in FINAL_CODES:
            code = ExitCode(death.status)
            return self, End(exit_code=code, reason=FINAL_REASONS[code], message=death.words)
        if self.strategy == RECREATE:
            message = f"{death.words}; restart.strategy is {RECREATE}, so a new pod takes over"
            return self, End(exit_code=_exhausted(death), reason=death.cause, message=message)
        progressed = death.step is not None and death.step > self.highest_step
        fruitless = 0 if progressed else self.fruitless + 1
        following = replace(
            self,
            fruitless=fruitless,
            highest_step=max(self.highest_step, -1 if death.step is None else death.step),
        )
        if fruitless >= FRUITLESS_LIMIT:
            message = f"{death.words}; {FRUITLESS_LIMIT} starts in a row made no new step"
            return following, End(exit_code=_exhausted(death), reason=_exhausted_reason(death), message=message)
        return following, Restart(cause=death.cause, delay_s=delay_s(fruitless))


def delay_s(fruitless: int) -> float:
    """Pause before the next start: none while training moves or at its first failure, then 1, 2, 4 … 30 s."""
    if fruitless <= 1:
        return 0.0
    return float(min(FIRST_BACKOFF_S * 2 ** min(fruitless - 2, 16), MAX_BACKOFF_S))


def _exhausted(death: Death) -> ExitCode:
    return ExitCode.HUNG if death.hung else ExitCode.TRAINER_CRASHED


def _exhausted_reason(death: Death) -> RunReason:
    return RunReason.HANG if death.hung else RunReason.RESTARTS_EXHAUSTED
