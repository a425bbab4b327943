"""`python -m esper_runtime.tolaria.trainer`: one training process, started and watched by the supervisor.

Exit codes are esper_leyline.exitcodes. Whatever ends it by its own doing leaves last-word.json; only a kill does not.
"""

import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path

import torch
from esper_leyline import paths
from esper_leyline.events import Level, RunEvent
from esper_leyline.exitcodes import ExitCode
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import RunConfig, RunConfigError, parse

from esper_runtime.checkpoint import CheckpointDirError, CheckpointError, NoValidCheckpointError
from esper_runtime.sidecar import logs
from esper_runtime.sidecar.environment import SettingsError
from esper_runtime.tolaria import rpc
from esper_runtime.tolaria.assemble import Bench, assemble, build, lay_out, seed_for
from esper_runtime.tolaria.entrypoint import UserCodeError, find, shortened
from esper_runtime.tolaria.lastword import LastWord
from esper_runtime.tolaria.loop import train
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.place import Place
from esper_runtime.tolaria.state import StateMismatchError

CLOSE_S = 5.0
log = logging.getLogger(__name__)


def main() -> int:
    """Runs to an exit code."""
    os.umask(paths.UMASK)
    logs.configure("trainer", os.environ)
    try:
        place = Place.read(os.environ)
        config = parse(place.config_file.read_text(encoding="utf-8"))
    except (SettingsError, RunConfigError, OSError) as error:
        log.critical("cannot start: %s", error)
        return ExitCode.CONFIG
    dump_stacks_on_request(place.run_dir)
    (place.run_dir / paths.LAST_WORD).unlink(missing_ok=True)
    try:
        bench = lay_out(place, config)
    except (CheckpointDirError, CheckpointError, OSError) as error:
        outcome = Outcome(
            exit_code=ExitCode.CHECKPOINT_DIR, reason=RunReason.CHECKPOINT_DIR_UNUSABLE, message=str(error)
        )
        leave_last_word(place.run_dir, outcome)
        return outcome.exit_code
    return conclude(bench, run(bench, config))


def warm() -> str:
    """What a spare does beforehand: every import of a start, and nothing else. Why that is impossible, or nothing."""
    os.umask(paths.UMASK)
    try:
        place = Place.read(os.environ)
        config = parse(place.config_file.read_text(encoding="utf-8"))
        seed_for(config)
        find(config.entrypoint, code_dir=place.code_dir)
    except (SettingsError, RunConfigError, OSError, UserCodeError) as error:
        return str(error)
    # The first optimizer of a process imports torch's compiler, the first call of gRPC starts its core.
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    rpc.warm_up(place.run_dir / paths.KASMINA_SOCKET)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return f"{config.entrypoint} uses a CUDA device when it is imported, which would take its memory twice"
    return ""


def run(bench: Bench, config: RunConfig) -> Outcome:
    """Trains. An error with a meaning of its own becomes its Outcome; anything else is a crash."""
    try:
        built = build(bench)
        bench.laps.mark("build")
        parts = assemble(bench, built)
        bench.laps.mark("restore")
        parts.control.listen()
        outcome = train(parts, built.state)
        parts.step.close()
        parts.checkpoints.close(CLOSE_S)
        return outcome
    except UserCodeError as error:
        return Outcome(exit_code=ExitCode.USER_CODE, reason=error.reason, message=str(error))
    except StateMismatchError as error:
        return Outcome(exit_code=ExitCode.USER_CODE, reason=RunReason.USER_CODE_ERROR, message=str(error))
    except NoValidCheckpointError as error:
        return Outcome(exit_code=ExitCode.NO_VALID_CHECKPOINT, reason=RunReason.NO_VALID_CHECKPOINT, message=str(error))
    except Exception as error:  # broad: user code runs here and may raise anything; its own words are the report
        log.exception("training crashed")
        return Outcome(exit_code=ExitCode.TRAINER_CRASHED, reason=RunReason.TRAINER_CRASHED, message=shortened(error))


_WITHOUT_FAILURE = frozenset({ExitCode.COMPLETE, ExitCode.HALTED, ExitCode.DRAINED, ExitCode.TRAINER_CRASHED})
"""Ends that are none, and crashes, which the supervisor reports as it does kills."""


def conclude(bench: Bench, outcome: Outcome) -> int:
    step = bench.heart.step
    log.info("trainer ends: %s (%d) %s", outcome.reason, outcome.exit_code, outcome.message)
    if outcome.exit_code not in _WITHOUT_FAILURE:
        bench.events.failure(outcome.reason, outcome.message, exit_code=outcome.exit_code, step=step)
    level = Level.CRITICAL if outcome.exit_code is ExitCode.TRAINER_CRASHED else Level.INFO
    ended = {"reason": outcome.reason, "message": outcome.message, "exitCode": int(outcome.exit_code)}
    bench.record.append(RunEvent.ENDED, step=step, level=level, **ended, savedStep=outcome.saved_step)
    if not bench.record.close(CLOSE_S):
        log.error("the run's record lacks its end: the volume took no line for %g s", CLOSE_S)
    leave_last_word(bench.place.run_dir, outcome, step=step, epoch=bench.heart.epoch)
    return int(outcome.exit_code)


def leave_last_word(run_dir: Path, outcome: Outcome, *, step: int | None = None, epoch: int | None = None) -> None:
    word = LastWord(
        reason=outcome.reason,
        message=outcome.message,
        exit_code=outcome.exit_code,
        step=step,
        saved_step=outcome.saved_step,
        epoch=epoch,
    )
    try:
        word.write(run_dir / paths.LAST_WORD)
    except OSError as error:
        log.error("cannot leave the last word: %s", error)


def dump_stacks_on_request(run_dir: Path) -> None:
    """SIGUSR1 writes the stacks of all threads; the file stays open for that."""
    descriptor = os.open(run_dir / paths.STACK_DUMP, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o660)
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)


if __name__ == "__main__":
    sys.exit(main())
