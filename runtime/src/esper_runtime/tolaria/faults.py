"""Injected faults (spec.faultInjection) for tests and demonstrations: each once per run, recorded before it fires."""

import os
import signal
import time
from collections.abc import Callable, Sequence

import torch
from esper_leyline.phases import FaultKind
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Fault
from torch import Tensor

from esper_runtime.checkpoint.wal import Kind
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.telemetry import Events
from esper_runtime.tolaria.update import Update

SPIKE_FACTOR = 1e4
DEFAULT_SLOW_MS = 1000


class InjectedCrash(RuntimeError):
    """The Crash fault."""


class Faults:
    """Asked three times per step; answers at once when no fault is due."""

    def __init__(
        self,
        faults: Sequence[Fault],
        *,
        rank: int,
        facts: Facts,
        events: Events,
        spike_steps: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._facts = facts
        self._events = events
        self._spike_steps = spike_steps
        self._sleep = sleep
        self._due: dict[int, list[tuple[str, Fault]]] = {}
        self._spike_until = 0
        for index, fault in enumerate(faults):
            key = f"{index}:{fault.kind}:{fault.step}"
            if fault.rank == rank and key not in facts.state.fired_faults:
                self._due.setdefault(fault.step, []).append((key, fault))

    def before_step(self, step: int) -> None:
        if step not in self._due:
            return
        for fault in self._take(step, {FaultKind.CRASH, FaultKind.HANG, FaultKind.SLOW_STEP, FaultKind.KILL_TRAINER}):
            if fault.kind is FaultKind.CRASH:
                raise InjectedCrash(f"fault injection: Crash at step {step}")
            if fault.kind is FaultKind.SLOW_STEP:
                self._sleep((fault.milliseconds or DEFAULT_SLOW_MS) / 1000)
            elif fault.kind is FaultKind.HANG:
                self._hang(fault)
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_loss(self, step: int, loss: Tensor) -> Tensor:
        if step in self._due:
            for fault in self._take(step, {FaultKind.NON_FINITE_LOSS, FaultKind.LOSS_SPIKE}):
                if fault.kind is FaultKind.NON_FINITE_LOSS:
                    loss = loss * float("nan")
                else:
                    self._spike_until = step + self._spike_steps
        return loss * SPIKE_FACTOR if step < self._spike_until else loss

    @torch.no_grad()
    def on_gradient(self, step: int, update: Update) -> bool:
        """Whether it changed one."""
        if step not in self._due:
            return False
        taken = self._take(step, {FaultKind.NON_FINITE_GRADIENT})
        for _ in taken:
            gradient = next(gradient for gradient in update.gradients() if gradient.numel())
            gradient[(0,) * gradient.ndim] = float("nan")
        return bool(taken)

    def due(self, step: int) -> bool:
        """Whether this step is to be tampered with."""
        return step in self._due or step < self._spike_until

    def rolled_back(self) -> None:
        """A rollback ends a spike: the batches that carried it are skipped."""
        self._spike_until = 0

    def _take(self, step: int, kinds: set[FaultKind]) -> list[Fault]:
        """Faults of `kinds` that are due and whose firing is durably recorded."""
        due = self._due[step]
        taken: list[Fault] = []
        for key, fault in [entry for entry in due if entry[1].kind in kinds]:
            due.remove((key, fault))
            if not self._facts.record(Kind.FAULT, key=key):
                self._events.notice(
                    RunReason.FAULT_INJECTED,
                    f"{fault.kind} at step {step} not injected: {self._facts.lost}",
                    warning=True,
                )
                continue
            self._events.notice(RunReason.FAULT_INJECTED, f"{fault.kind} at step {step}", warning=True)
            taken.append(fault)
        if not due:
            del self._due[step]
        return taken

    def _hang(self, fault: Fault) -> None:
        """Neither beats nor looks at signals, for as long as asked or for ever."""
        if fault.milliseconds is not None:
            self._sleep(fault.milliseconds / 1000)
            return
        while True:
            self._sleep(3600)
