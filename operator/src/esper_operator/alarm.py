"""Stops that concern many runs at once: all of them hear by Redis before anything slow happens to any.

The order is that of the whole: Redis for every run in a few exchanges, then the ConfigMaps, then the touches of pods
that have not answered (the API client lets writes in by that rank), then, from the queue, the statuses, by which time
the answers are there. What is not done here, because the API server refused it or for a bug, each run's reconcile does.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from esper_operator.decide import decide
from esper_operator.kube.errors import KubeError
from esper_operator.logs import run_context
from esper_operator.model import Plan, Pod, Run, RunKey, SignalOrder
from esper_operator.signals import ANSWER_PATIENCE_S, BUS_PATIENCE_S
from esper_operator.worker import Reconciler

logger = logging.getLogger(__name__)

TOGETHER = 256
"""Signals per exchange with Redis. Sealing takes 0.5 ms each, the exchange 0.2 ms."""

BUS_PER_SIGNAL_S, ANSWER_PER_SIGNAL_S = 0.002, 0.01
"""Added to the patience for each signal that goes at the same time."""


@dataclass(frozen=True, slots=True)
class _Due:
    run: Run
    plan: Plan
    order: SignalOrder
    pods: tuple[Pod, ...]


class Alarm:
    """`ring` says that runs may have to be signalled; `run`, for the leader, does it and wakes them."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._signals = reconciler.signals
        self._queue = reconciler.queue
        self._rung: dict[RunKey, None] = {}
        self._bell = asyncio.Event()

    def ring(self, keys: Iterable[RunKey]) -> None:
        """Each of them is in the queue afterwards, sooner or later."""
        self._rung.update(dict.fromkeys(keys))
        self._bell.set()

    async def run(self) -> None:
        """Endless."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._bell.wait()
                self._bell.clear()
                rung, self._rung = self._rung, {}
                found = await self._announce(list(rung))
                patience_s = ANSWER_PATIENCE_S + ANSWER_PER_SIGNAL_S * len(found)
                for due in found:
                    group.create_task(self._record(due, patience_s), name=f"record {due.run.key}")

    async def _announce(self, keys: list[RunKey]) -> list[_Due]:
        """By Redis, which has its chance and no more: a Redis that hangs delays nobody for longer."""
        found: list[_Due] = []
        exchanges: list[asyncio.Task[None]] = []
        for start in range(0, len(keys), TOGETHER):
            due = [one for key in keys[start : start + TOGETHER] if (one := self._due(key)) is not None]
            if due:
                try:
                    exchanges.append(self._signals.announce((one.run, one.order) for one in due))
                except Exception:  # broad: as below; each run's own reconcile sends its signal
                    logger.exception("a bug: %d signals could not be announced together", len(due))
                    for one in due:
                        self._queue.add(one.run.key, urgent=True)
                    continue
                found += due
            await asyncio.sleep(0)
        for one in found:
            run_context.set({"run": str(one.run.key), "uid": one.run.uid, "generation": one.run.generation})
            self._reconciler.note(one.plan, self._signals.newest(one.run.uid))
        if exchanges:
            await asyncio.wait(exchanges, timeout=BUS_PATIENCE_S + BUS_PER_SIGNAL_S * len(found))
        return found

    def _due(self, key: RunKey) -> _Due | None:
        """The signal that this run needs now; None wakes the run instead, which finds out what else there is to do."""
        run = self._reconciler.runs.get(key)
        settled = run is not None and self._signals.settled(run.uid)
        try:
            due = self._needs(run) if run is not None and settled else None
        except Exception:  # broad: a bug in one run must not keep the others from stopping; its reconcile meets it too
            logger.exception("a bug: %s could not be looked at", key)
            due = None
        if due is None:
            self._queue.add(key, urgent=not settled)
        return due

    def _needs(self, run: Run) -> _Due | None:
        seen = self._reconciler.glance(run)
        if not seen.jobs:
            return None
        plan = decide(replace(seen, signal=self._signals.newest(run.uid)))
        if plan.signal is None:
            return None
        return _Due(run, plan, plan.signal, seen.pods)

    async def _record(self, due: _Due, patience_s: float) -> None:
        key = due.run.key
        try:
            await self._signals.record(due.run, due.pods, patience_s)
        except KubeError as error:
            logger.info("%s: the signal is not on record yet: %s", key, error)
        except Exception:  # broad: as above
            logger.exception("a bug: the signal to %s was not recorded", key)
        finally:
            self._queue.add(key, urgent=True)
