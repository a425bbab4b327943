"""What the operator writes in each stage of a run's life, counted from the API server's audit log.

The test asserts the bounds, `tests/bench/bench_api_writes.py` prints the table.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.apiserver.operators import Cluster

RUN = "digits"
STATUS = "patch espertrainingruns/status"
EVENT = "create events"
PROGRESS_PERIOD_S = 10.0
QUIET_S = 1.5
"""Without a write for so long, a stage is over: Events follow the status from a queue of their own."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    seconds: float
    changes: int
    """Phases that the history gained."""
    writes: Counter[str]
    conflicts: int
    said: tuple[str, ...]
    """Events of the stage, in no order."""

    @property
    def statuses(self) -> int:
        return self.writes[STATUS]

    @property
    def events(self) -> int:
        return self.writes[EVENT]

    @property
    def objects(self) -> int:
        """Writes of anything else: the run's objects, its Jobs, signals to its pods."""
        return self.writes.total() - self.statuses - self.events


class Life:
    """A run's life in stages. The trainer steps all the time unless it is halted."""

    def __init__(self, place: Cluster) -> None:
        self.place = place
        self.stages: list[Stage] = []

    async def tell(self, *, steady_s: float, frozen_s: float, rest_s: float) -> list[Stage]:
        """How long it trains undisturbed, stays frozen, and stays halted or finished."""
        place = self.place
        await self._stage("start", lambda: place.create_run(RUN, steps=1_000_000), phase="Running")
        await self._stage("steady training", lambda: None, seconds=steady_s)
        await self._stage("rollback", self._poison, until=lambda s: s["rollbacks"]["total"] == 1)
        await self._stage("freeze", lambda: place.set_spec(RUN, emergencyStop="Freeze"), phase="Halted")
        await self._stage("frozen", lambda: None, seconds=frozen_s)
        await self._stage("new operator", place.replace_operator, seconds=rest_s)
        await self._stage("lift", lambda: place.set_spec(RUN, emergencyStop="None"), phase="Running")
        await self._stage("halt", lambda: place.set_spec(RUN, emergencyStop="Checkpoint"), phase="Halted")
        await self._stage("halted", lambda: None, seconds=rest_s)
        await self._stage("resume", lambda: place.set_spec(RUN, emergencyStop="None"), phase="Running")
        await self._stage("crash", self._crash, until=lambda s: s["attempt"] == 3 and s["phase"] == "Running")
        await self._stage("finish", self._finish, phase="Succeeded")
        await self._stage("finished", lambda: None, seconds=rest_s)
        return self.stages

    async def _stage(
        self,
        name: str,
        act: Callable[[], Awaitable[None] | None],
        *,
        phase: str = "",
        until: Callable[[dict[str, Any]], Any] | None = None,
        seconds: float = 0.0,
    ) -> None:
        place = self.place
        mark, history, started = place.audit_mark(), len(place.status(RUN).get("history", [])), time.monotonic()
        told = {event["metadata"]["uid"] for event in place.events(RUN)}
        done = act()
        if done is not None:
            await done
        if phase or until:
            await place.sees(RUN, until or (lambda s: s.get("phase") == phase), f"{RUN}: {name}")
            await self._quiet(mark)
        else:
            await asyncio.sleep(seconds)  # what is measured: how much happens meanwhile
        writes = place.writes(mark)
        self.stages.append(
            Stage(
                name=name,
                seconds=time.monotonic() - started,
                changes=len(place.status(RUN)["history"]) - history,
                writes=Counter(f"{verb} {resource}" for verb, resource, code in writes if code < 300),
                conflicts=sum(code == 409 for _, _, code in writes),
                said=tuple(
                    f"{event['reason']}: {event['note']}"
                    for event in place.events(RUN)
                    if event["metadata"]["uid"] not in told
                ),
            )
        )

    async def _quiet(self, mark: int) -> None:
        """Until nothing was written for a while; progress of a training run comes more rarely than that."""
        seen, since = -1, time.monotonic()
        while time.monotonic() < since + QUIET_S:
            count = len(self.place.writes(mark))
            if count != seen:
                seen, since = count, time.monotonic()
            await asyncio.sleep(0.2)

    def _poison(self) -> None:
        training = self.place.node.training(RUN)
        training.nan_at = training.step + 2

    async def _crash(self) -> None:
        await self.place.node.crash(self.place.node.pod_names(RUN)[-1], 70)

    def _finish(self) -> None:
        training = self.place.node.training(RUN)
        training.total_steps = training.step + 2
