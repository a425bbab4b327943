"""What the supervisor tells of deaths and ends: to the run's record, its log, the journal, and the kubelet.

A death goes to the record first: nobody else knows of one that the record lacks, should the container be killed next.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from esper_leyline import paths
from esper_leyline.events import Level, RunEvent
from esper_leyline.exitcodes import ExitCode
from esper_leyline.incidents import FIELD
from esper_leyline.pages import Heartbeat
from esper_leyline.v1 import report_pb2 as pb

from esper_runtime.tolaria import lastword
from esper_runtime.tolaria.lastword import LastWord
from esper_runtime.tolaria.supervisor import core
from esper_runtime.tolaria.supervisor.events import Events
from esper_runtime.tolaria.supervisor.evidence import Evidence
from esper_runtime.tolaria.supervisor.lines import Lines
from esper_runtime.tolaria.supervisor.policy import FINAL_CODES, Death
from esper_runtime.tolaria.supervisor.totals import Totals


class Account:
    """Of one container. Every method is called while no trainer lives."""

    def __init__(self, run_dir: Path, *, events: Events, lines: Lines, totals: Totals, evidence: Evidence) -> None:
        self._last_word_file = run_dir / paths.LAST_WORD
        self._events = events
        self._lines = lines
        self._totals = totals
        self._evidence = evidence

    def restart(self, action: core.ReportRestart, *, phase: pb.RuntimePhase, step: int, incident: str) -> str:
        """A death, or a start that was refused, and another start follows. Gives it in words, for the log."""
        with self._events.incident(incident):
            return self._restart(action, phase, step, incident)

    def _restart(self, action: core.ReportRestart, phase: pb.RuntimePhase, step: int, incident: str) -> str:
        death, words = action.death, _words(action.death, step)
        message = _lines_of(words, self._more(death))
        self._write_failed(death, message, step, {FIELD: incident} if incident else {})
        if not death.refused:
            self._totals.add_restart(action.restart.cause, step)
        self._events.failure(reason=death.cause, message=message, exit_code=death.exit_code, step=step)
        if not death.refused:  # a start that was refused leaves the run in its phase
            self._events.transition(phase, pb.RUNTIME_PHASE_RESTARTING, reason=death.cause, message=words, step=step)
        self._lines.write()
        return words

    def end(self, finish: core.Finish, *, phase: pb.RuntimePhase, beat: Heartbeat | None) -> LastWord:
        """The container ends. Gives its last word."""
        said = lastword.read(self._last_word_file)
        word = last_word(finish, said, beat)
        if not _told_by_trainer(finish):
            self._report_end(finish, word, phase, recorded=_recorded_by_trainer(finish, said))
        self._lines.write()
        return word

    def _report_end(self, finish: core.Finish, word: LastWord, phase: pb.RuntimePhase, *, recorded: bool) -> None:
        """An end that the trainer could not report itself. `recorded`: in the record it did."""
        death, step = finish.death, word.step or 0
        ended = {"reason": word.reason, "message": word.message, "exitCode": word.exit_code}
        if death is not None and death.status not in FINAL_CODES and finish.end.exit_code not in _ORDERED:
            self._write_failed(death, _lines_of(_words(death, step), self._more(death)), step, {})
        to_phase = _ORDERED.get(finish.end.exit_code, pb.RUNTIME_PHASE_FAILED)
        if to_phase == pb.RUNTIME_PHASE_FAILED:
            if not recorded:
                self._lines.add(RunEvent.RUN_FAILED, level=Level.CRITICAL, step=step, **ended)
                self._lines.write()
            exit_code = finish.end.exit_code if death is None else death.exit_code
            message = _lines_of(word.message, self._evidence.told if death is not None and death.hung else "")
            self._events.failure(reason=word.reason, message=message, exit_code=exit_code, step=step)
        self._events.transition(phase, to_phase, reason=word.reason, message=word.message, step=step)
        if not recorded:
            self._lines.add(RunEvent.ENDED, level=Level.INFO, step=step, **ended, savedStep=word.saved_step)

    def _write_failed(self, death: Death, message: str, step: int, more: Mapping[str, str]) -> None:
        fields: dict[str, Any] = {"reason": death.cause, "message": message, **more}
        if not death.refused:
            fields["exitCode"] = death.exit_code
        if death.hung and self._evidence.file:
            fields["evidence"] = self._evidence.file
        self._lines.add(RunEvent.TRAINER_FAILED, level=Level.ERROR, step=step, **fields)
        self._lines.write()

    def _more(self, death: Death) -> str:
        """What is known of a death beside how it came: what a hang looked like, or the trainer's own words."""
        if death.hung:
            return self._evidence.told
        said = None if death.refused else lastword.read(self._last_word_file)
        return "" if said is None else said.message


_ORDERED: dict[int, pb.RuntimePhase] = {
    ExitCode.HALTED: pb.RUNTIME_PHASE_HALTED,
    ExitCode.DRAINED: pb.RUNTIME_PHASE_STOPPING,
}
"""Ends that somebody asked for, however the trainer died of it."""


def last_word(finish: core.Finish, said: LastWord | None, beat: Heartbeat | None) -> LastWord:
    """The trainer's own account where its exit is the container's, else the supervisor's."""
    end = finish.end
    step, epoch = (None, None) if beat is None else (beat.step, beat.epoch)
    if said is None:
        return LastWord(reason=end.reason, message=end.message, exit_code=end.exit_code, step=step, epoch=epoch)
    if finish.death is not None and finish.death.status == end.exit_code:
        return replace(said, exit_code=end.exit_code, step=_first(said.step, step), epoch=_first(said.epoch, epoch))
    return LastWord(
        reason=end.reason,
        message=f"{end.message}\n{said.message}".strip(),
        exit_code=end.exit_code,
        step=_first(said.step, step),
        saved_step=said.saved_step,
        epoch=_first(said.epoch, epoch),
    )


def _told_by_trainer(finish: core.Finish) -> bool:
    """True when the trainer ended as it meant to and has reported it: complete, halted or drained."""
    chosen = (ExitCode.COMPLETE, ExitCode.HALTED, ExitCode.DRAINED)
    return finish.death is not None and finish.death.status == finish.end.exit_code and finish.end.exit_code in chosen


def _recorded_by_trainer(finish: core.Finish, said: LastWord | None) -> bool:
    """A trainer that ends as it means to writes so to the record, once it is so far as to know its step."""
    death = finish.death
    meant = death is not None and death.status == finish.end.exit_code and death.status in FINAL_CODES
    return meant and said is not None and said.step is not None


def _words(death: Death, step: int) -> str:
    return death.words if death.refused else f"{death.words} at step {step}"


def _lines_of(*parts: str) -> str:
    return "\n".join(filter(None, parts))


def _first(value: int | None, other: int | None) -> int | None:
    return other if value is None else value
