"""Redis is quicker than a status: pods may have answered a halt before the status speaks of it."""

import pytest

from tests.support.scenes import phases, running


@pytest.mark.parametrize(
    ("mode", "moves"),
    [
        ("Freeze", [("RUNNING", "FROZEN")]),
        ("Checkpoint", [("RUNNING", "HALTING"), ("HALTING", "HALTED")]),
        ("Kill", [("RUNNING", "HALTING"), ("HALTING", "HALTED")]),
    ],
)
def test_it_was_halting_and_is_halted_once(mode: str, moves: list[tuple[str, str]]) -> None:
    scene = running().later(1).stopped(mode).signalled(mode).later(0.2)
    for move in moves:
        scene = scene.reporting(move[1], step=21, moved=move)
    scene = scene.later(0.1).acknowledging(phase=moves[-1][1], step=21).later(2).reconciled()
    assert phases(scene)[-3:] == ["Running", "Halting", "Halted"]
    times = [entry["time"] for entry in scene.status["history"]]
    assert times == sorted(times)
    assert (scene.status["halt"]["acknowledged"], scene.status["phase"]) == (1, "Halted")
    later = scene.later(1).reconciled()
    assert phases(later) == phases(scene)


def test_an_answer_without_its_transition_is_a_halt_too() -> None:
    scene = running().later(1).stopped("Freeze").signalled("Freeze").later(0.2)
    scene = scene.acknowledging(phase="FROZEN", step=21).reconciled()
    assert phases(scene)[-3:] == ["Running", "Halting", "Halted"]


def test_a_run_without_pods_is_halted_at_once() -> None:
    scene = running().failed(70).reconciled().later(1).stopped("Checkpoint").without_jobs().reconciled()
    assert phases(scene)[-2:] == ["Restarting", "Halted"]


@pytest.mark.parametrize("mode", ["Freeze", "Checkpoint"])
def test_the_pod_that_replaces_a_silent_one_answers_for_it(mode: str) -> None:
    scene = running().stopped(mode).reconciled()
    scene = scene.later(1).failed(143).with_pods(number=1).later(2).reconciled()
    pod = scene.pods[-1]["metadata"]["name"]
    assert scene.status["halt"]["missing"] == [pod, f"{pod}/kasmina", f"{pod}/tamiyo"]
    scene = scene.later(1).acknowledging("SEEN", phase="HALTING").reconciled().later(20)
    assert scene.plan().deletions == (), "it has answered and may still be saving"
    scene = scene.acknowledging(phase="FROZEN" if mode == "Freeze" else "HALTED").reconciled()
    halt = scene.status["halt"]
    assert (scene.status["phase"], halt["acknowledged"], halt["expected"]) == ("Halted", 1, 1)
