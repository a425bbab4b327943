"""The guard around torch.compile, with backends that work, refuse, break in the forward or in the backward pass."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from esper_leyline.events import RunEvent
from esper_runtime.checkpoint.volume import RECORD_FILE
from esper_runtime.tolaria import compiled as module
from esper_runtime.tolaria import features
from esper_runtime.tolaria.compiled import Compiled, beating_while_compiling, is_device_error
from esper_runtime.tolaria.record import read
from torch._dynamo import callback

from tests.support.trainers import PAUSED, Pod, Turns
from tests.support.waiting import PATIENT_S

pytestmark = pytest.mark.timeout(240)
STEPS = 9
FAIL_AT = 4


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Broken:
    """A compiler whose product fails in its `fail_at`-th call, after it has drawn random numbers and moved buffers."""

    def __init__(self, *, fail_at: int, where: str, error: Exception) -> None:
        self.fail_at, self.where, self.error = fail_at, where, error
        self.calls = 0

    def __call__(self, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def product(model: Any, batch: Any) -> torch.Tensor:
            self.calls += 1
            value = loss(model, batch)
            if self.calls < self.fail_at:
                return value
            if self.where == "backward":
                value.register_hook(self._fail)
                return value
            raise self.error

        return product

    def _fail(self, gradient: torch.Tensor) -> torch.Tensor:
        raise self.error


def pod_of(root: Path, *, compile: str = "off", **config: Any) -> Pod:
    return Pod(root).configure(entrypoint="featured:build", config={"losses": "", "compile": compile, **config})


def trained(pod: Pod) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    parts, state = pod.assemble()
    turns, losses = Turns(parts, state), []
    for _ in range(STEPS):
        assert turns.run(1) is PAUSED
        losses.append(state.loss)
    return losses, {name: value.clone() for name, value in state.model.state_dict().items()}, parts


def same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


def fallbacks(pod: Pod) -> list[str]:
    return [notice.message for notice in pod.events("notice") if notice.reason == "FeatureFallback"]


def with_compiler(monkeypatch: pytest.MonkeyPatch, compiler: Any) -> None:
    monkeypatch.setattr(module, "torch_compiler", lambda asked: compiler)


@pytest.mark.row("T37")
def test_a_backend_that_works_is_used_from_the_second_step_on(tmp_path: Path):
    """`eager` compiles with dynamo alone: it needs no C++ compiler and gives the bits of eager code."""
    pod = pod_of(tmp_path / "compiled", compile="backend:eager")
    result = trained(pod)
    same(result, trained(pod_of(tmp_path / "eager", compile="off")))
    assert not fallbacks(pod)
    metrics = result[2].step._metrics
    assert metrics.value("tolaria.train.compile_enabled") == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.row("T37")
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_fails_is_repeated_eagerly_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, accumulation_steps: int
):
    broken = Broken(fail_at=FAIL_AT, where=where, error=RuntimeError("miscompiled"))
    with_compiler(monkeypatch, broken)
    options = {"accumulation_steps": accumulation_steps, "samples": 130}
    pod = pod_of(tmp_path / "compiled", compile="default", **options)
    result = trained(pod)
    same(result, trained(pod_of(tmp_path / "eager", **options)))
    assert broken.calls == FAIL_AT, "after the first failure nothing compiled is called"
    (told,) = fallbacks(pod)
    assert "RuntimeError: miscompiled" in told
    assert result[2].step._metrics.value("tolaria.train.compile_enabled") == 0


@pytest.mark.row("T37")
def test_without_a_cpp_compiler_training_goes_on_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a user of the CPU image sees: inductor finds no compiler."""
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/nonexistent/c++",))
    monkeypatch.setattr(config, "compile_threads", 1)
    monkeypatch.setattr(config, "force_disable_caches", True)
    pod = pod_of(tmp_path / "compiled", compile="default")
    result = trained(pod)
    same(result, trained(pod_of(tmp_path / "eager")))
    (told,) = fallbacks(pod)
    assert "torch.compile failed" in told


def test_an_unknown_mode_falls_back_too(tmp_path: Path):
    pod = pod_of(tmp_path / "compiled", compile="fastest")
    same(trained(pod), trained(pod_of(tmp_path / "eager")))
    (told,) = fallbacks(pod)
    assert "fastest" in told


@pytest.mark.parametrize(
    ("asked", "event"),
    [({"compile": "fastest"}, RunEvent.COMPILE_FALLBACK), ({"cuda_graphs": True}, RunEvent.GRAPH_FALLBACK)],
    ids=lambda value: str(value),
)
def test_each_feature_that_is_off_has_its_own_name_in_the_record(tmp_path: Path, asked: Any, event: RunEvent):
    pod = pod_of(tmp_path, **asked)
    parts, state = pod.assemble()
    assert Turns(parts, state).run(3) is PAUSED
    assert parts.publisher.close(PATIENT_S)
    told = [line for line in read(tmp_path / "checkpoints" / pod.uid / RECORD_FILE) if "fallback" in line["event"]]
    assert [(line["event"], line["fields"]["reason"]) for line in told] == [(event, "FeatureFallback")]


def test_an_error_of_the_users_own_code_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The eager repetition raises it again: no fallback is told."""
    with_compiler(monkeypatch, lambda loss: loss)
    pod = pod_of(tmp_path, compile="default")
    parts, state = pod.assemble()
    assert Turns(parts, state).run(3) is PAUSED
    state.model.forward = lambda inputs: inputs @ torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Turns(parts, state).run(1)
    assert not fallbacks(pod)


def test_a_step_that_cannot_be_taken_back_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The failing step has replaced a buffer: only a restart knows what it was."""
    with_compiler(monkeypatch, Broken(fail_at=1, where="forward", error=RuntimeError("miscompiled")))
    pod = pod_of(tmp_path, compile="default")
    parts, state = pod.assemble()
    assert Turns(parts, state).run(1) is PAUSED
    state.model.norm.running_mean = torch.zeros(33)
    with pytest.raises(RuntimeError, match="miscompiled"):
        Turns(parts, state).run(1)
    assert not fallbacks(pod)


@pytest.mark.row("T37")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
)
def test_an_error_of_the_device_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    with_compiler(monkeypatch, Broken(fail_at=1, where="forward", error=error))
    pod = pod_of(tmp_path, compile="default")
    parts, state = pod.assemble()
    with pytest.raises(type(error)):
        Turns(parts, state).run(3)
    assert not fallbacks(pod)
    assert state.step == 1


def test_other_errors_are_none_of_the_device():
    assert not is_device_error(RuntimeError("shapes cannot be multiplied"))
    assert not is_device_error(ValueError("CUDA error"))


def test_somebody_beats_while_a_compilation_runs_and_only_then(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BEAT_S", 0.001)
    beaten, beats = threading.Event(), []

    def beat() -> None:
        beats.append(threading.current_thread().name)
        beaten.set()

    def compilers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "esper-compiling"]

    args = callback.CallbackArgs(callback.CallbackTrigger.DYNAMO, "0")
    with beating_while_compiling(beat):
        assert not compilers()
        callback.callback_handler.run_start_callbacks(args)
        assert beaten.wait(30)
        callback.callback_handler.run_end_callbacks(args)
        assert not compilers(), "nobody else beats once training goes on"
    assert set(beats) == {"esper-compiling"}
    assert not callback.callback_handler.start_callbacks
    assert not callback.callback_handler.end_callbacks


def test_features_are_off_unless_asked_for(tmp_path: Path):
    parts, _ = pod_of(tmp_path).assemble()
    metrics = parts.step._metrics
    names = ("compile_enabled", "amp_enabled", "tf32_enabled", "pin_memory", "graph_enabled", "foreach_enabled")
    assert {name: metrics.value(f"tolaria.train.{name}") for name in names} == dict.fromkeys(names, 0)
    assert type(parts.step).__name__ == "Step"
    assert "_evaluate" not in vars(parts.step)
    assert not isinstance(parts.step._loss, Compiled)
    assert features.under_autocast(len, "float32", torch.device("cpu")) is len


@pytest.mark.row("T41")
def test_cuda_graphs_on_a_cpu_are_told_to_be_off(tmp_path: Path):
    pod = pod_of(tmp_path, cuda_graphs=True)
    parts, _ = pod.assemble()
    (told,) = fallbacks(pod)
    assert "CUDA graphs are off: this run is on a cpu" in told
    assert parts.step._metrics.value("tolaria.train.graph_enabled") == 0
