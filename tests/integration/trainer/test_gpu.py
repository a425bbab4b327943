"""What only a GPU can show of the PyTorch features. The rest of each is tested on a CPU beside its module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from esper_runtime.tolaria.metrics import Metrics

from tests.support.trainers import PAUSED, Pod, Turns, close

STEPS = 20
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def trained(root: Path, **config: Any) -> tuple[dict[str, torch.Tensor], Metrics]:
    """Weights after STEPS steps on the GPU, and the metrics."""
    pod = Pod(root).configure(entrypoint="featured:build", config={"losses": "", "epochs": 10, **config})
    parts, state = pod.assemble()
    try:
        assert Turns(parts, state).run(STEPS) is PAUSED
        assert next(state.model.parameters()).is_cuda
        weights = {name: value.detach().cpu().clone() for name, value in state.model.state_dict().items()}
        return weights, parts.step._metrics
    finally:
        close(parts)


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight, relative to the largest weight of its tensor."""
    floats = [name for name, value in one.items() if value.is_floating_point()]
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max().clamp_min(1e-12)) for n in floats)


@pytest.mark.row("T41")
def test_a_graph_learns_what_eager_steps_learn(tmp_path: Path):
    eager, _ = trained(tmp_path / "eager")
    for attempt in ("first", "second"):  # the second trainer of a process must not pay for the first
        graphed, metrics = trained(tmp_path / attempt, cuda_graphs=True)
        assert metrics.value("tolaria.graph.replays_total") > 0
        assert metrics.value("tolaria.graph.capture_ms") < 200
        assert farthest(eager, graphed) <= 1e-5


@pytest.mark.row("T37")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_much_the_same(tmp_path: Path, precision: str):
    whole, _ = trained(tmp_path / "float32")
    mixed, metrics = trained(tmp_path / precision, precision=precision)
    assert metrics.value("tolaria.train.amp_enabled") == 1
    assert farthest(whole, mixed) <= 0.2


@pytest.mark.row("T40")
def test_the_copy_to_the_device_is_timed(tmp_path: Path):
    _, metrics = trained(tmp_path, data="map", workers=2)
    assert metrics.value("tolaria.train.pin_memory") == 1
    copied = metrics.value("tolaria.train.h2d_copy_ms")
    assert copied is not None
    assert 0 < copied < 50
