"""Traces: what is recorded, what is not touched, and that no failure of it makes or repeats a step."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from esper_leyline.exitcodes import ExitCode
from esper_leyline.runconfig import Profiler as Window
from esper_runtime.tolaria import profiler as module
from esper_runtime.tolaria.profiler import Profiler, TraceWriter, is_wanted

from tests.support.trainers import UID, Pod
from tests.support.waiting import PATIENT_S

FIRST, ACTIVE = 4, 3
RANGES = ("forward", "loss", "backward", "optimizer_step")


def pod_of(root: Path, **window: Any) -> Pod:
    """16 batches of the tiny workload in each of two epochs; snapshots every 5 steps."""
    return Pod(root).configure(profiler={"firstStep": FIRST, "activeSteps": ACTIVE, **window})


def traces(pod: Pod) -> list[Path]:
    return sorted((pod.root / "checkpoints" / UID / "profiles").glob("*"))


def counts(trace: Path) -> dict[str, int]:
    """How often each of Tolaria's ranges is in a Chrome trace."""
    found: dict[str, int] = {}
    for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]:
        name = event.get("name", "")
        if name.startswith("tolaria/") and event.get("cat") == "user_annotation":
            found[name.removeprefix("tolaria/")] = found.get(name.removeprefix("tolaria/"), 0) + 1
    return found


def notices(pod: Pod, reason: str) -> list[str]:
    return [notice.message for notice in pod.events("notice") if notice.reason == reason]


@pytest.mark.parametrize(
    ("window", "wanted"),
    [
        (Window(first_step=3, active_steps=2), [3, 4]),
        (Window(first_step=3, active_steps=2, every_steps=5, repeat=3), [3, 4, 8, 9, 13, 14]),
        (Window(first_step=1, active_steps=2, every_steps=1, repeat=2), [1, 2, 3, 4]),
    ],
)
def test_windows(window: Window, wanted: list[int]):
    assert [step for step in range(1, 40) if is_wanted(window, step)] == wanted


@pytest.mark.row("T39")
def test_a_trace_loads_and_has_the_ranges_of_its_steps(tmp_path: Path):
    pod = pod_of(tmp_path, everySteps=6, repeat=2)  # both in the first epoch: without sidecars its end is a failure
    assert pod.train().exit_code == ExitCode.COMPLETE
    first, second = traces(pod)
    assert first.name == "steps-00000004-00000006.json.gz"
    assert second.name == "steps-00000010-00000012.json.gz"
    for trace in (first, second):
        found = counts(trace)
        assert {name: found.get(name) for name in RANGES} == dict.fromkeys(RANGES, ACTIVE)
        assert found["snapshot"] == 1
    assert len(notices(pod, "ProfilerTrace")) == 2
    assert not notices(pod, "ProfilerFailed")


@pytest.mark.row("T39")
def test_a_rollback_within_a_window_is_a_range(tmp_path: Path):
    pod = pod_of(tmp_path, activeSteps=12)
    pod.document["faultInjection"] = [{"kind": "NonFiniteLoss", "step": 8}]
    pod.write_config()
    assert pod.train().exit_code == ExitCode.COMPLETE
    assert counts(traces(pod)[0])["rollback"] == 1


@pytest.mark.row("T39")
def test_training_is_the_same_with_and_without(tmp_path: Path):
    plain = Pod(tmp_path / "plain").configure()
    assert plain.train().exit_code == ExitCode.COMPLETE
    pod = pod_of(tmp_path / "profiled")
    assert pod.train().exit_code == ExitCode.COMPLETE
    assert pod.losses() == plain.losses()


def test_outside_of_windows_nothing_is_in_the_way(tmp_path: Path):
    """No wrapper and no hook before the first window and after the last; without the setting no Profiler at all."""
    parts, state = pod_of(tmp_path / "profiled").assemble()
    profiler = parts.step
    assert isinstance(profiler, Profiler)
    step, memory = profiler._step, parts.memory
    kept = dict(vars(step)), dict(vars(state.update)), dict(vars(memory)).keys()
    while state.step < FIRST + ACTIVE + 1:
        batch = state.loader.take()
        assert profiler.run(batch, state)
        covered = "apply" in vars(state.update)
        assert covered == is_wanted(profiler._window, state.step)
        assert bool(state.model._forward_hooks) == covered
    assert vars(step) == kept[0]
    assert vars(state.update).keys() == kept[1].keys()
    assert vars(memory).keys() == kept[2]
    profiler.close()
    parts, _ = Pod(tmp_path / "plain").configure().assemble()
    assert not isinstance(parts.step, Profiler)


class Failing:
    """A recording that fails in one of its calls."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _maybe(self, where: str) -> None:
        if where == self.where:
            raise RuntimeError(f"cannot {where}")

    def start(self) -> None:
        self._maybe("start")

    def stop(self) -> None:
        self._maybe("stop")

    def export_chrome_trace(self, path: str) -> None:
        self._maybe("export")


@pytest.mark.row("T39")
@pytest.mark.parametrize("where", ["start", "stop", "export"])
def test_a_failure_is_told_and_training_makes_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    plain = Pod(tmp_path / "plain").configure()
    assert plain.train().exit_code == ExitCode.COMPLETE
    pod = pod_of(tmp_path / "profiled")
    parts, state = pod.assemble()
    assert isinstance(parts.step, Profiler)
    parts.step._new_recording = lambda: Failing(where)  # type: ignore[method-assign]
    from esper_runtime.tolaria.loop import train

    assert train(parts, state).exit_code == ExitCode.COMPLETE
    parts.step.close()
    parts.checkpoints.close(PATIENT_S)
    parts.epoch_end.handshake.close()
    assert pod.losses() == plain.losses()
    assert state.step == 32
    told = notices(pod, "ProfilerFailed")
    assert told
    assert f"cannot {where}" in told[0]
    assert "training goes on" in told[0]
    metrics = parts.step._metrics
    assert metrics.value("tolaria.profiler.traces_failed_total") == len(told)
    assert metrics.value("tolaria.profiler.traces_emitted_total") is None
    assert metrics.value("tolaria.profiler.enabled") == 0
    assert not [path for path in traces(pod) if path.name.endswith(".gz")]


def test_conservative_mode_records_nothing_and_ends_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts, state = pod_of(tmp_path).assemble()
    profiler = parts.step
    assert isinstance(profiler, Profiler)

    class Mode:
        conservative = False

    profiler._stability = mode = Mode()  # type: ignore[assignment]
    recorded = []
    for _ in range(FIRST + ACTIVE):
        mode.conservative = state.step + 1 == FIRST + 1
        profiler.run(state.loader.take(), state)
        recorded.append(profiler._recording is not None)
    assert recorded == [False, False, False, True, False, True, False]
    profiler.close()


class Sized:
    """A recording whose trace has so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_bytes(bytes(self.size))


def written(writer: TraceWriter, sizes: list[int]) -> list[str]:
    """Errors of traces written one after the other."""
    errors = []
    for index, size in enumerate(sizes):
        assert writer.submit(Sized(size), f"steps-{index:08d}")  # type: ignore[arg-type]
        while not (found := writer.outcomes()):
            writer._thread.join(0.001)  # type: ignore[union-attr]
        errors += [error for _, error in found]
    writer.close(30)
    return errors


def test_number_and_size_of_traces_have_bounds(tmp_path: Path):
    assert written(TraceWriter(tmp_path / "few", max_traces=2), [1, 1, 1]) == ["", "", ""]
    assert [path.name for path in sorted((tmp_path / "few").iterdir())] == [
        "steps-00000001.json.gz",
        "steps-00000002.json.gz",
    ]
    errors = written(TraceWriter(tmp_path / "small", max_bytes=100), [60, 60, 101])
    assert errors[:2] == ["", ""]
    assert "trace fewer steps" in errors[2]
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["steps-00000001.json.gz"]


def test_a_volume_that_cannot_be_written_is_a_failure_of_the_trace_alone(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (error,) = written(TraceWriter(tmp_path / "file" / "profiles"), [1])
    assert "Not a directory" in error


def test_nobody_waits_for_a_slow_volume(tmp_path: Path):
    writer = TraceWriter(tmp_path)
    writer._thread = module.threading.Thread(target=lambda: None)  # a thread that takes nothing
    assert writer.submit(Sized(1), "one")  # type: ignore[arg-type]
    assert writer.submit(Sized(1), "two")  # type: ignore[arg-type]
    assert not writer.submit(Sized(1), "three")  # type: ignore[arg-type]
