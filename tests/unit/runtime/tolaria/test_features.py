"""What a workload may ask for, what it gets on a CPU, and the parts of the GPU's ways that need no GPU."""

import os
import sys
from typing import Any

import pytest
import torch
from esper_runtime.tolaria import features, workers
from esper_runtime.tolaria.data import Loader
from esper_runtime.tolaria.graphs import copy_into, shape_of
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.stream import StreamLoader

from tests.support.trainers import CODE

sys.path.insert(0, str(CODE))
featured = pytest.importorskip("featured")

CPU = torch.device("cpu")


def workload(**fields: Any) -> Any:
    import dataclasses

    return dataclasses.replace(featured.build({"data": "map"}), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps is 0; give an integer of at least 1"),
        ({"num_workers": -1}, "num_workers is -1; give an integer of at least 0"),
        ({"precision": "float8"}, "precision is 'float8'; give one of float32, bfloat16, float16"),
        ({"compile": True}, 'compile is True; give "off" or a mode'),
        ({"prefetch": "yes"}, "prefetch is 'yes'; give True, False or \"auto\""),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0; give an integer of at least 1"),
        ({"cuda_graphs": True, "compile": "default"}, "cuda_graphs goes with neither compile"),
        ({"cuda_graphs": True, "precision": "float16"}, "cuda_graphs goes with neither compile, nor float16"),
        ({"cuda_graphs": True, "accumulation_steps": 2}, "nor accumulation_steps"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError) as raised:
        workload(**fields)
    assert message in str(raised.value)


def test_steps_per_epoch_is_for_streams():
    with pytest.raises(ValueError, match="steps_per_epoch is for an IterableDataset"):
        features.loader_of(workload(steps_per_epoch=3), CPU, Metrics(None))


def test_a_schedule_over_a_stream_needs_its_length():
    stream = workload(train=featured.Stream(9), schedule=lambda step, steps: 1.0)
    with pytest.raises(ValueError, match=r"give Workload\.steps_per_epoch"):
        features.loader_of(stream, CPU, Metrics(None))


@pytest.mark.parametrize("asked", [True, False, "auto"])
def test_on_a_cpu_nothing_is_pinned_or_read_ahead(asked: Any):
    metrics = Metrics(None)
    plain = features.loader_of(workload(prefetch=asked, pin_memory=asked), CPU, metrics)
    assert isinstance(plain, Loader)
    assert metrics.value("tolaria.train.pin_memory") == 0
    stream = features.loader_of(workload(train=featured.Stream(9), prefetch=asked), CPU, metrics)
    assert isinstance(stream, StreamLoader)
    assert stream._stage is None


def test_collate_makes_the_batches_of_training():
    one = workload(collate=lambda samples: torch.tensor([index for _, _, index in samples]), shuffle=False)
    loader = features.loader_of(one, CPU, Metrics(None))
    batch = loader.take()
    assert batch is not None
    assert batch.tolist() == [0, 1, 2, 3]


@pytest.mark.row("T37")
def test_precision_of_products_is_left_alone_on_a_cpu():
    """There it would change results: some CPUs round float32 products when asked for "high"."""
    before = torch.get_float32_matmul_precision()
    metrics = Metrics(None)
    features.set_up_process(workload(tf32=True), CPU, metrics)
    assert torch.get_float32_matmul_precision() == before
    assert metrics.value("tolaria.train.tf32_enabled") == 0
    assert metrics.value("tolaria.train.amp_enabled") == 0
    features.set_up_process(workload(precision="bfloat16"), CPU, metrics)
    assert metrics.value("tolaria.train.amp_enabled") == 1


def test_deterministic_algorithms_are_for_those_who_ask(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        features.set_up_process(workload(), CPU, Metrics(None))
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        features.set_up_process(workload(deterministic=True), CPU, Metrics(None))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.row("T37")
@pytest.mark.parametrize(("foreach", "expected"), [(None, 0), (False, 0), (True, 1)])
def test_foreach_is_reported_as_it_is(foreach: bool | None, expected: int):
    class State:
        class update:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, foreach=foreach)

    assert features._runs_foreach(State) == bool(expected)  # type: ignore[arg-type]


def test_a_graphs_inputs_are_filled_in_place():
    batch = (torch.zeros(2, 3), {"labels": torch.zeros(2, dtype=torch.long)})
    places = [batch[0].data_ptr(), batch[1]["labels"].data_ptr()]  # type: ignore[index]
    fresh = (torch.ones(2, 3), {"labels": torch.ones(2, dtype=torch.long)})
    copy_into(batch, fresh)
    assert batch[0].eq(1).all()
    assert batch[1]["labels"].eq(1).all()  # type: ignore[index]
    assert [batch[0].data_ptr(), batch[1]["labels"].data_ptr()] == places  # type: ignore[index]
    assert shape_of(batch) == shape_of(fresh) == [(2, 3, torch.float32), (2, torch.int64)]
    assert shape_of((batch[0][:1], batch[1])) != shape_of(batch)


def test_each_batch_has_a_seed_of_its_own():
    from esper_runtime.tolaria.data import mixed

    seeds = {mixed(seed, epoch, batch) for seed in range(4) for epoch in range(20) for batch in range(50)}
    assert len(seeds) == 4 * 20 * 50
    assert workers.worker_context().get_start_method() != "fork"
