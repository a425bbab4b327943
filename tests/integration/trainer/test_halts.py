"""A signal that comes in the middle of a step ends that step and begins no other, whatever it orders."""

from pathlib import Path
from typing import Any

import pytest
from esper_leyline import paths
from esper_leyline.exitcodes import ExitCode
from esper_leyline.pages import EmergencyPage
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.emergency_pb2 import EMERGENCY_MODE_CHECKPOINT, EMERGENCY_MODE_FREEZE, EMERGENCY_MODE_KILL
from esper_runtime.tolaria.loop import train

from tests.support.trainers import Pod, close

CHECKPOINT, FREEZE, KILL = EMERGENCY_MODE_CHECKPOINT, EMERGENCY_MODE_FREEZE, EMERGENCY_MODE_KILL
OTHER = "ef" * 16


class Halted:
    """A trainer in this process that is given `orders` in the middle of step 7, one after the other as it obeys."""

    def __init__(self, root: Path, *orders: tuple[int, str, bool]) -> None:
        self.pod = Pod(root).configure(config={"epochs": 2})
        EmergencyPage.create(self.pod.run_dir / paths.EMERGENCY_PAGE).close()  # weatherlight is there first
        self.orders, self.given = list(orders), 0
        self.frozen_at: list[int] = []
        parts, self.state = self.pod.assemble()
        step: Any = parts.step
        run, steps = step.run, 0

        def in_its_middle(batch: Any, state: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 7:
                self.order()
            return run(batch, state)

        step.run = in_its_middle
        control: Any = parts.control
        control._sleep = self.freeze
        try:
            self.outcome = train(parts, self.state)
        finally:
            close(parts)
        self.steps = steps

    def order(self) -> None:
        mode, name, clear = self.orders.pop(0)
        self.given += 1
        self.pod.signal(mode, seq=self.given, signal_id=name, clear=clear)

    def freeze(self, _seconds: float) -> None:
        self.frozen_at.append(self.state.step)
        assert len(self.frozen_at) < 1000, "nobody thaws it"
        if self.orders:
            self.order()

    def phases(self) -> list[str]:
        return [to for _, to, _ in self.pod.moves()]


A, B = "ab" * 16, "cd" * 16


@pytest.mark.row("K09")
def test_kill_ends_the_run_behind_the_step_that_it_met(tmp_path: Path) -> None:
    halted = Halted(tmp_path, (KILL, A, False))
    assert (halted.outcome.exit_code, halted.steps, halted.state.step) == (ExitCode.HALTED, 7, 7)
    assert halted.outcome.saved_step is None
    assert halted.phases()[-2:] == ["HALTING", "HALTED"]


@pytest.mark.row("K09")
def test_checkpoint_saves_the_step_that_it_met_and_ends_the_run(tmp_path: Path) -> None:
    halted = Halted(tmp_path, (CHECKPOINT, A, False))
    assert (halted.outcome.exit_code, halted.steps) == (ExitCode.HALTED, 7)
    assert halted.outcome.saved_step == halted.pod.saved_step() == 7
    assert halted.pod.events("ack")[-1].saved_step == 7


@pytest.mark.row("K09")
def test_freeze_stands_still_behind_the_step_that_it_met_until_its_own_id_lifts_it(tmp_path: Path) -> None:
    halted = Halted(tmp_path, (FREEZE, A, False), (FREEZE, B, True), (FREEZE, A, True))
    assert halted.outcome.exit_code == ExitCode.COMPLETE
    assert (set(halted.frozen_at), halted.given) == ({7}, 3)  # the last of three lifts it
    undisturbed = Pod(tmp_path / "undisturbed").configure(config={"epochs": 2})
    assert undisturbed.train().exit_code == ExitCode.COMPLETE
    assert halted.pod.losses() == undisturbed.losses()


@pytest.mark.row("K09")
@pytest.mark.parametrize("stronger", [CHECKPOINT, KILL])
def test_what_comes_during_a_freeze_acts_at_once_and_nothing_weaker_ends_it(tmp_path: Path, stronger: int) -> None:
    halted = Halted(tmp_path, (FREEZE, A, False), (FREEZE, B, False), (FREEZE, A, True), (stronger, OTHER, False))
    assert (halted.outcome.exit_code, halted.steps, set(halted.frozen_at)) == (ExitCode.HALTED, 7, {7})
    assert halted.given == 4
    assert halted.outcome.saved_step == (7 if stronger == CHECKPOINT else None)
    assert halted.pod.heartbeat().phase == pb.RUNTIME_PHASE_HALTED  # type: ignore[union-attr]
