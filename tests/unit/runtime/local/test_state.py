"""The state directory: one runner at a time, spec and status changed without losing either."""

import os
import threading

import pytest
from esper_runtime.local.errors import RunnerActive, StateError
from esper_runtime.local.state import MAX_EVENTS_BYTES, StateDir, find_runs


@pytest.fixture
def state(tmp_path):
    made = StateDir(tmp_path / "ns" / "run")
    made.create()
    made.write_new({"metadata": {"name": "run", "generation": 1}, "spec": {"suspend": False}})
    return made


def test_a_changed_spec_raises_the_generation(state):
    changed = state.change_spec(lambda spec: spec.update(suspend=True))
    assert changed["metadata"]["generation"] == 2
    assert state.read()["spec"] == {"suspend": True}


def test_an_unchanged_spec_writes_nothing(state):
    before = state.resource.stat().st_ino
    state.change_spec(lambda spec: spec.update(suspend=False))
    assert state.resource.stat().st_ino == before


def test_status_keeps_a_spec_that_changed_meanwhile(state):
    state.change_spec(lambda spec: spec.update(suspend=True))
    found = state.write_status({"phase": "Running"}, durable=False)
    assert found["spec"] == {"suspend": True}
    assert state.read()["status"] == {"phase": "Running"}


def test_writers_side_by_side_lose_nothing(state):
    def count(field):
        for _ in range(50):
            state.change_spec(lambda spec: spec.update({field: spec.get(field, 0) + 1}))

    threads = [threading.Thread(target=count, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for number in range(50):
        state.write_status({"n": number}, durable=False)
    for thread in threads:
        thread.join()
    found = state.read()
    assert (found["spec"]["a"], found["spec"]["b"], found["status"]["n"]) == (50, 50, 49)
    assert found["metadata"]["generation"] == 101


def test_the_second_runner_is_refused_and_told_the_first_ones_process(state):
    with state.runner_lock():
        assert state.runner_pid() == os.getpid()
        with pytest.raises(RunnerActive, match=f"process {os.getpid()} runs this already"):
            state.runner_lock().__enter__()
    assert state.runner_pid() is None


def test_the_seed_is_made_once_and_private(state):
    first = state.seed()
    assert state.seed() == first
    assert len(first) == 32
    assert (state.root / "seed").stat().st_mode & 0o777 == 0o600


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StateError, match=r"holds no run \(thesis.tex\).*--state"):
        StateDir(tmp_path).create()


def test_a_damaged_resource_is_named(state):
    state.resource.write_text("{")
    with pytest.raises(StateError, match=r"resource.json: cannot be read"):
        state.read()


def test_events_are_bounded(state):
    for number in range(0, 5000, 50):
        state.add_events([f'{{"n": {n}, "x": "{"y" * 100}"}}' for n in range(number, number + 50)])
    assert state.events.stat().st_size < MAX_EVENTS_BYTES * 1.1
    assert state.events.read_text().startswith('{"n"')
    assert '{"n": 4999,' in state.events.read_text()


def test_runs_are_found_below_the_root(state, tmp_path):
    assert [found.root for found in find_runs(tmp_path)] == [state.root]


def test_scratch_of_a_killed_runner_is_removed_by_the_next_and_nothing_else(state, tmp_path):
    ours, foreign = tmp_path / "esper-1", tmp_path / "precious"
    for directory in (ours, foreign):
        directory.mkdir()
    state.remember_scratch([ours, foreign])
    state.forget_scratch()
    state.forget_scratch()
    assert not ours.exists()
    assert foreign.exists()


def test_a_state_directory_without_a_run_may_hold_a_note_of_scratch(tmp_path):
    made = StateDir(tmp_path / "run")
    made.create()
    made.remember_scratch([])
    made.clear()
    made.create()
