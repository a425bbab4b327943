"""The supervisor's one thread: waits for signals, deaths, weatherlight and deadlines, and carries out decisions.

It sleeps in one selector. A death is noticed by SIGCHLD, a halt by a byte from weatherlight, everything else by a
look once a second at the latest.
"""

import logging
import os
import selectors
import signal
import time
from collections.abc import Mapping
from typing import assert_never, cast

from esper_leyline import env, paths
from esper_leyline.exitcodes import ExitCode
from esper_leyline.incidents import FIELD, incident_at
from esper_leyline.pages import MAX_SLOTS, EmergencyRecord, Heartbeat, Page, PageError
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import report_pb2 as pb

from esper_runtime.checkpoint import Volume
from esper_runtime.tolaria.supervisor import child, core, gauges, pulse, room
from esper_runtime.tolaria.supervisor.account import Account
from esper_runtime.tolaria.supervisor.core import Action, Core, Stage
from esper_runtime.tolaria.supervisor.events import CONTAINER, Events
from esper_runtime.tolaria.supervisor.evidence import Evidence
from esper_runtime.tolaria.supervisor.hang import HangLimits
from esper_runtime.tolaria.supervisor.lines import Lines
from esper_runtime.tolaria.supervisor.link import WeatherlightLink
from esper_runtime.tolaria.supervisor.oom import oom_kills
from esper_runtime.tolaria.supervisor.policy import RECREATE, Death, RestartPolicy
from esper_runtime.tolaria.supervisor.probe import ProbeServer
from esper_runtime.tolaria.supervisor.settings import Settings
from esper_runtime.tolaria.supervisor.spare import SparePolicy, Spares, spawn
from esper_runtime.tolaria.supervisor.totals import Totals
from esper_runtime.tolaria.supervisor.wake import SignalWake

TICK_S = 1.0
RESTART_LOOK_S = 0.02
"""The same while the first step after a death is awaited, whose time is measured."""
STILL_S = 10.0
"""A loop that has not turned for so long is not alive any more."""
_OPENMP = {"GOMP_SPINCOUNT": "1000"}
"""Default of the trainer: threads that wait for each other sleep soon. On CPUs that are shared with others, long spins
take the time of the very thread that is waited for (measured: 6 times the CPU per step)."""
log = logging.getLogger(__name__)


class Supervisor:
    """One container's life. `run` returns its exit code; the constructor opens nothing."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        config = settings.run_config
        self._settings = settings
        self._environ = dict(environ)
        self._volume = Volume(settings.checkpoint_dir, run_uid=settings.run_uid, attempt=settings.attempt)
        self._totals = Totals(self._volume.wal_file)
        self._core = Core(
            attempt=settings.attempt,
            policy=RestartPolicy(strategy=config.restart.strategy),
            limits=HangLimits(
                heartbeat_s=config.health.heartbeat_timeout_seconds,
                progress_s=config.health.progress_timeout_seconds,
            ),
            drain_s=settings.drain_s,
            now_s=time.monotonic(),
        )
        self._selector = selectors.DefaultSelector()
        self._spares = Spares(
            module=settings.trainer_module,
            policy=SparePolicy(strategy_allows=config.restart.strategy != RECREATE),
            selector=self._selector,
            measure=room.measure,
            private_bytes=room.private_bytes,
            tell=self._tell_of_spare,
        )
        self._trainer: int | None = None
        self._recovery: core.Recovery | None = None
        """Of the newest start."""
        self._incident = ""
        """Of the newest death."""
        self._running_since_s: float | None = None
        """Of the living trainer; None before its first step."""
        self._restart_s: float | None = None
        """From the newest death that was noticed to the first step after it."""
        self._evidence = Evidence(settings.in_run_dir(paths.STACK_DUMP), self._volume.attempt_dir)
        self._starts = 0
        self._incarnation = 0
        self._oom_before: int | None = None
        self._emergency: Page | None = None
        self._turned_s = time.monotonic()
        self._finish: core.Finish | None = None
        self._last_beat: Heartbeat | None = None
        """Of any trainer of this container: a successor that never beat leaves its predecessor's standing."""

    def run(self) -> int:
        """Boots, supervises until Finish, and says the last word. CheckpointDirError before the first trainer."""
        self._trainer_page = Page.create(self._settings.trainer_page, MAX_SLOTS)
        self._own_page = Page.create(self._settings.in_run_dir(paths.SUPERVISOR_PAGE))
        self._boot()
        self._link = WeatherlightLink(
            self._settings.in_run_dir(paths.WEATHERLIGHT_SOCKET),
            self._selector,
            greeting=f"tolaria {self._settings.rank} {self._incarnation}\n".encode(),
        )
        probe = self._serve_probes()
        wake = SignalWake(self._selector)
        try:
            self._look_for_halt()
            while self._finish is None:
                self._turn(wake)
            return self._end(self._finish)
        finally:
            self._spares.retire()
            wake.close()
            if probe is not None:
                probe.server_close()

    def _boot(self) -> None:
        self._volume.claim()
        self._incarnation = self._volume.count_boot()
        self._totals.replay()
        lines = Lines(
            self._volume.record_file,
            attempt=self._settings.attempt,
            incarnation=self._incarnation,
            step=self._step,
        )
        self._events = Events(self._settings.in_run_dir(paths.JOURNAL), lines=lines, counters=self._totals.counters)
        self._account = Account(
            self._settings.run_dir, events=self._events, lines=lines, totals=self._totals, evidence=self._evidence
        )
        self._events.boot(
            attempt=self._settings.attempt,
            rank=self._settings.rank,
            incarnation=self._incarnation,
            world_size=self._settings.world_size,
        )
        log.info("attempt %d, incarnation %d", self._settings.attempt, self._incarnation)

    def _serve_probes(self) -> ProbeServer | None:
        try:
            probe = ProbeServer(
                self._settings.http_port,
                port_file=self._settings.in_run_dir(f"{CONTAINER}.port"),
                alive=lambda: time.monotonic() - self._turned_s < STILL_S,
                metrics=self._metrics,
            )
        except OSError as error:
            # Training matters more than being watched; the kubelet has no liveness probe on this container.
            log.error("cannot listen on %s=%d: %s", env.HTTP_PORT, self._settings.http_port, error)
            return None
        try:
            probe.start()
        except RuntimeError as error:  # the system gives no thread
            log.error("nobody answers probes: %s", error)
            probe.server_close()
            return None
        return probe

    # One turn of the loop

    def _turn(self, wake: SignalWake) -> None:
        self._turned_s = now_s = time.monotonic()
        if self._link.connect(now_s=now_s):
            self._look_for_halt()
        beat = self._beat()
        seen = pulse.take(self._trainer) if self._core.doubts and self._trainer is not None else None
        self._perform(self._core.tick(beat, now_s=now_s, pulse=seen))
        self._write_own_page()
        if self._finish is not None:
            return
        self._note_running(beat, now_s)
        self._tend_spare(now_s)
        for key, _ in self._selector.select(self._wait_s()):
            if key.data is self._link:
                if self._link.readable():
                    self._look_for_halt()
            elif key.data is self._spares:
                self._spares.readable(now_s=time.monotonic())
            else:
                wake.take()
        if wake.stop_asked:
            self._perform(self._core.stop(now_s=time.monotonic()))
        self._reap()
        self._look_for_halt()

    def _wait_s(self) -> float:
        now_s = time.monotonic()
        due = [now_s + TICK_S, self._core.deadline_s, self._spares.deadline_s]
        if self._trainer is not None and self._recovery is not None and self._running_since_s is None:
            due.append(now_s + RESTART_LOOK_S)
        retry_s = self._link.deadline_s()
        if retry_s is not None:
            due.append(retry_s)
        return max(0.0, min(due) - now_s)

    def _beat(self) -> Heartbeat | None:
        """The living trainer's newest heartbeat; None before its first."""
        try:
            beat = Heartbeat.of(self._trainer_page.read())
        except PageError as error:
            log.warning("%s", error)
            return self._core.beat
        if self._trainer is None or beat.pid != self._trainer:
            return None
        self._last_beat = beat
        return beat

    def _note_running(self, beat: Heartbeat | None, now_s: float) -> None:
        """Training runs once the trainer's first step is done."""
        if beat is None or beat.phase != pb.RUNTIME_PHASE_RUNNING or self._running_since_s is not None:
            return
        self._running_since_s = now_s
        if self._recovery is not None:
            self._restart_s = beat.beat_ns / 1e9 - self._recovery.detected_s

    def _tend_spare(self, now_s: float) -> None:
        if self._core.stopping or self._core.halting:
            self._spares.retire()
            return
        trained_s = None if self._running_since_s is None else now_s - self._running_since_s
        environ = self._environment(start=self._starts + 1)
        self._spares.tend(now_s=now_s, trained_s=trained_s, trainer=self._trainer, environ=environ)
        hung = self._spares.overdue(now_s=now_s)
        if hung is not None and hung == self._trainer:
            _signal_group(hung, signal.SIGKILL)
            self._spawn()

    def _tell_of_spare(self, message: str) -> None:
        log.warning("%s", message)
        self._events.notice(reason=RunReason.SPARE_UNAVAILABLE, message=message)

    def _look_for_halt(self) -> None:
        record = self._read_emergency()
        if record is not None:
            self._perform(self._core.signalled(record, now_s=time.monotonic()))

    def _read_emergency(self) -> EmergencyRecord | None:
        try:
            if self._emergency is None:
                self._emergency = Page.open(self._settings.in_run_dir(paths.EMERGENCY_PAGE))
            return EmergencyRecord.of(self._emergency.read())
        except PageError as error:
            log.debug("%s", error)
            return None

    def _reap(self) -> None:
        """Takes in every dead child: the trainer, and what it left behind."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid == self._spares.pid:
                self._oom_before = oom_kills()  # what the kernel took was the spare, not the trainer
            self._spares.died(pid, code, now_s=time.monotonic())
            if pid == self._trainer:
                self._trainer_died(code)

    def _trainer_died(self, status: int) -> None:
        now_s = time.monotonic()
        assert self._trainer is not None
        self._core.note(self._beat())
        _signal_group(self._trainer, signal.SIGKILL)
        self._trainer = None
        kills = oom_kills()
        out_of_memory = kills is not None and self._oom_before is not None and kills > self._oom_before
        self._evidence.keep()
        self._totals.replay()
        self._perform(self._core.died(status, now_s=now_s, out_of_memory=out_of_memory))

    # Carrying out

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case core.Start():
                    self._start(action.recovery)
                case core.Terminate():
                    log.info("SIGTERM: the trainer has %.1f s to save", self._settings.drain_s)
                    self._signal_trainer(signal.SIGTERM)
                case core.DumpStacks():
                    log.error("trainer hangs: %s", action.why)
                    if self._trainer is not None:
                        self._evidence.look(self._trainer, action.why)
                    self._signal_trainer(signal.SIGUSR1)
                case core.Kill():
                    log.warning("killing the trainer: %s", action.why)
                    if self._trainer is not None:
                        _signal_group(self._trainer, signal.SIGKILL)
                case core.ReportRestart():
                    self._report_restart(action)
                case core.Acknowledge():
                    self._acknowledge(action.record)
                case core.Finish():
                    self._finish = action
                case _:
                    assert_never(action)

    def _start(self, recovery: core.Recovery | None) -> None:
        """The spare becomes the trainer; without one, a process is started."""
        self._starts += 1
        self._recovery = recovery
        self._running_since_s = None
        self._oom_before = oom_kills()
        for name in (paths.LAST_WORD, paths.STACK_DUMP, paths.TRAINER_METRICS):
            self._settings.in_run_dir(name).unlink(missing_ok=True)
        self._trainer = self._spares.take(self._of_start(self._starts), now_s=time.monotonic())
        if self._trainer is None:
            self._spawn()
        else:
            self._log_start(spare=True)

    def _spawn(self) -> None:
        """A cold start. What the system refuses, at a limit of processes or memory, is an attempt that failed."""
        try:
            self._trainer = spawn(self._settings.trainer_module, self._environment(start=self._starts))
        except OSError as error:
            self._trainer = None
            self._starts -= 1
            self._perform(self._core.refused(str(error), now_s=time.monotonic()))
        else:
            self._log_start(spare=False)

    def _log_start(self, *, spare: bool) -> None:
        log.info("trainer started", extra={"trainer_pid": self._trainer, "start": self._starts, "spare": spare})

    def _environment(self, *, start: int) -> dict[str, str]:
        return {**_OPENMP, **self._environ, child.PARENT_PID: str(os.getpid()), **self._of_start(start)}

    def _of_start(self, start: int) -> dict[str, str]:
        """What is known when a trainer begins; a spare is told then, and knows no recovery before."""
        told = {env.INCARNATION: str(self._incarnation), env.TRAINER_START: str(start)}
        recovery = self._recovery if start == self._starts else None
        if recovery is not None:
            told[env.RECOVERY_CAUSE] = recovery.cause
            told[env.RECOVERY_INCIDENT] = self._incident
            told[env.RECOVERY_DETECTED_NS] = str(int(recovery.detected_s * 1e9))
            if recovery.step is not None:
                told[env.RECOVERY_STEP] = str(recovery.step)
        return told

    def _signal_trainer(self, number: signal.Signals) -> None:
        if self._trainer is not None:  # not reaped yet, so the PID is still its own
            os.kill(self._trainer, number)

    def _report_restart(self, action: core.ReportRestart) -> None:
        if not action.death.refused:
            here = (self._settings.attempt, self._settings.rank, self._incarnation, self._starts)
            self._incident = incident_at(self._settings.run_uid, *here)
        phase, step = self._phase(action.death), self._step()
        words = self._account.restart(action, phase=phase, step=step, incident=self._incident)
        told = {FIELD: self._incident}
        log.warning("%s; starting it again in %.0f s", words, action.restart.delay_s, extra=told)

    def _acknowledge(self, record: EmergencyRecord) -> None:
        settings = self._settings
        self._events.acknowledge(
            record, run_uid=settings.run_uid, attempt=settings.attempt, rank=settings.rank, step=self._step()
        )

    # The end

    def _end(self, finish: core.Finish) -> int:
        word = self._account.end(finish, phase=self._phase(finish.death), beat=self._last_beat)
        if self._settings.termination_log is not None:
            try:
                word.write_in_place(self._settings.termination_log)
            except OSError as error:
                log.error("cannot write %s: %s", self._settings.termination_log, error)
        self._write_own_page()
        self._link.say_clean_end()
        log.info("exit %d: %s: %s", word.exit_code, word.reason, word.message)
        return word.exit_code

    # What is known

    def _step(self) -> int:
        return 0 if self._last_beat is None else self._last_beat.step

    def _phase(self, death: Death | None) -> pb.RuntimePhase:
        """What the container was doing, by the dead trainer's last heartbeat."""
        if death is not None and death.phase in pb.RuntimePhase.values():
            return cast(pb.RuntimePhase, death.phase)
        tried = self._starts + (death is not None and death.refused)
        return pb.RUNTIME_PHASE_RESTARTING if tried > 1 else pb.RUNTIME_PHASE_STARTING

    def _write_own_page(self) -> None:
        words = (self._state(), self._trainer or 0, self._core.restarts, time.monotonic_ns(), 0, 0, 0)
        self._own_page.write(0, words)

    def _state(self) -> int:
        """A RuntimePhase: the supervisor's own view."""
        if self._finish is not None:
            ends = {ExitCode.COMPLETE: pb.RUNTIME_PHASE_SUCCEEDED, ExitCode.HALTED: pb.RUNTIME_PHASE_HALTED}
            ends[ExitCode.DRAINED] = pb.RUNTIME_PHASE_STOPPING
            return next((ends[code] for code in ends if code == self._finish.end.exit_code), pb.RUNTIME_PHASE_FAILED)
        if self._core.halting:
            return pb.RUNTIME_PHASE_HALTING
        if self._core.stopping:
            return pb.RUNTIME_PHASE_STOPPING
        if self._core.stage is Stage.ALIVE and self._core.beat is not None:
            return pb.RUNTIME_PHASE_RUNNING
        return pb.RUNTIME_PHASE_RESTARTING if self._core.restarts else pb.RUNTIME_PHASE_STARTING

    def _metrics(self) -> str:
        samples: tuple[gauges.Sample, ...] = (
            ("trainer_starts_total", "counter", "Starts of the trainer in this container", self._starts),
            ("in_place_restarts_total", "counter", "Restarts after a death", self._core.restarts),
            ("hangs_total", "counter", "Hangs noticed", self._core.hangs),
            ("trainer_step", "gauge", "Step of the newest heartbeat", self._step()),
            ("trainer_silent_seconds", "gauge", "Watched time since the newest heartbeat", self._core.silent_s),
            ("weatherlight_connected", "gauge", "1 while connected to weatherlight", int(self._link.connected)),
            ("incarnation", "gauge", "Starts of this container in this attempt", self._incarnation),
            ("spare_ready", "gauge", "1 while a spare trainer waits", int(self._spares.ready)),
            ("spare_starts_total", "counter", "Spare trainers begun", self._spares.starts),
            *self._restart_sample(),
        )
        return gauges.render(samples, self._settings.in_run_dir(paths.TRAINER_METRICS))

    def _restart_sample(self) -> tuple[gauges.Sample, ...]:
        if self._restart_s is None:
            return ()
        text = "Last restart, from the noticed death to the first step after it"
        return (("trainer_restart_seconds", "gauge", text, self._restart_s),)


def _signal_group(leader: int, number: signal.Signals) -> None:
    """To the trainer and all that it started in its group. Nothing left to signal is no error."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return
