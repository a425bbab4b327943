"""What a workload asks of PyTorch, switched on once: precision of products, mixed precision, compiler, CUDA graphs, the
way of its data. Metrics say what is really active; what cannot be had is named in a notice, and training goes without.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from esper_leyline.events import RunEvent
from esper_leyline.reasons import RunReason
from torch.utils.data import IterableDataset, default_collate

from esper_runtime.tolaria.amp import Loss, Scaler, under_autocast
from esper_runtime.tolaria.data import AnyLoader, Fetch, Loader, is_tensors
from esper_runtime.tolaria.faults import Faults
from esper_runtime.tolaria.learning_rate import LearningRate
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.prefetch import Ahead, CudaStage, Meter, Timed
from esper_runtime.tolaria.state import Extra, TrainState
from esper_runtime.tolaria.step import Step, step_of
from esper_runtime.tolaria.telemetry import Events, Heart
from esper_runtime.tolaria.workers import Seeded, Workers, reproducible
from esper_runtime.workload import Workload

_TF32_CAPABILITY = (8, 0)


def set_up_process(workload: Workload, device: torch.device, metrics: Metrics) -> None:
    """Settings that a process has once. Call before the model is moved to its device."""
    if workload.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    tf32 = False
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if workload.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = workload.tf32
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = workload.deterministic
        tf32 = workload.tf32 and torch.cuda.get_device_capability(device) >= _TF32_CAPABILITY
    metrics.set("tolaria.train.tf32_enabled", tf32)
    metrics.set("tolaria.train.amp_enabled", workload.precision != "float32")


# Data


def loader_of(workload: Workload, device: torch.device, metrics: Metrics) -> AnyLoader:
    """The loader of a workload's training data, by what the data is and where it goes. ValueError, TypeError."""
    on_gpu = device.type == "cuda"
    held = is_tensors(workload.train)
    pin = on_gpu and not held if workload.pin_memory == "auto" else workload.pin_memory and on_gpu and not held
    ahead = on_gpu and not held if workload.prefetch == "auto" else bool(workload.prefetch) and on_gpu and not held
    metrics.set("tolaria.train.pin_memory", bool(pin))
    stage = CudaStage(device, metrics) if ahead else None
    if isinstance(workload.train, IterableDataset):
        return _stream(workload, device, metrics, pin=bool(pin), stage=stage)
    if workload.steps_per_epoch is not None:
        raise ValueError("Workload.steps_per_epoch is for an IterableDataset: this data has a length")
    loader = Loader(
        workload.train,
        batch_size=workload.batch_size,
        seed=workload.seed,
        device=device,
        shuffle=workload.shuffle,
        drop_last=workload.drop_last,
        transform=workload.transform,
        collate=workload.collate,
        accumulation_steps=workload.accumulation_steps,
    )
    if held:
        return loader
    return _dataset(workload, loader, device, metrics, pin=bool(pin), stage=stage)


def _dataset(
    workload: Workload, loader: Loader, device: torch.device, metrics: Metrics, *, pin: bool, stage: CudaStage | None
) -> AnyLoader:
    """A map-style dataset: read here, by workers, or ahead."""
    target = device if stage is None else torch.device("cpu")
    dataset = Seeded(workload.train, seed=workload.seed, collate=workload.collate or default_collate)
    read: Fetch | None = None
    if workload.num_workers:
        read = Workers(
            loader,
            dataset,
            epochs=workload.epochs,
            workers=workload.num_workers,
            pin_memory=pin,
            device=target,
        )
    elif stage is not None:
        read = reproducible(loader, dataset, pin_memory=pin)
    if stage is not None and read is not None:

        def upcoming(epoch: int, number: int) -> Any:
            return loader.upcoming(epoch, number, epochs=workload.epochs)

        read = Ahead(read, stage, upcoming=upcoming)
    loader.fetch = Timed(read or loader.fetch, metrics)
    return loader


def _stream(
    workload: Workload, device: torch.device, metrics: Metrics, *, pin: bool, stage: CudaStage | None
) -> AnyLoader:
    from esper_runtime.tolaria.stream import Reader, StreamLoader  # torchdata is loaded by those who need it

    if workload.steps_per_epoch is None and workload.schedule is not None:
        raise ValueError("Workload.schedule needs the length of training: give Workload.steps_per_epoch")
    options = {
        "batch_size": workload.batch_size,
        "collate_fn": workload.collate,
        "drop_last": workload.drop_last,
        "pin_memory": pin,
    }
    # Read in this process, a stream may draw from the random states that training uses: not ahead of its turn.
    stage = stage if workload.num_workers else None
    return StreamLoader(
        Reader(workload.train, seed=workload.seed, workers=workload.num_workers, options=options),
        device=device,
        steps_per_epoch=workload.steps_per_epoch,
        transform=workload.transform,
        accumulation_steps=workload.accumulation_steps,
        stage=stage,
        meter=Meter(metrics, "tolaria.train.input_wait_ms"),
    )


# Steps


def extras_of(workload: Workload, loader: AnyLoader, device: torch.device) -> dict[str, Extra]:
    """What snapshots and checkpoints must carry for these features."""
    extras: dict[str, Extra] = {}
    if workload.precision == "float16":
        extras["scaler"] = Scaler(device)
    if not isinstance(loader, Loader):  # a stream: its place is more than two integers
        assert hasattr(loader, "capture")
        extras["loader"] = loader  # type: ignore[assignment]
    return extras


def build_step(
    workload: Workload,
    state: TrainState,
    faults: Faults,
    *,
    device: torch.device,
    learning_rate: LearningRate,
    events: Events,
    metrics: Metrics,
    heart: Heart,
    compiler: Callable[[Loss], Loss] | None = None,
) -> Step:
    """The step, with what was asked for around it. `compiler` replaces torch.compile."""

    def fell_back(metric: str, name: RunEvent) -> Callable[[str], None]:
        def tell(why: str) -> None:
            metrics.set(metric, 0)
            events.notice(RunReason.FEATURE_FALLBACK, why, warning=True, name=name)

        return tell

    scaler = state.extras.get("scaler")
    assert scaler is None or isinstance(scaler, Scaler)
    loss: Loss = under_autocast(workload.loss, workload.precision, device)
    compiled = None
    if workload.compile != "off":
        from esper_runtime.tolaria.compiled import Compiled, torch_compiler  # a second of imports

        compiled = Compiled(
            loss,
            compiler or torch_compiler(workload.compile),
            model=state.model,
            fell_back=fell_back("tolaria.train.compile_enabled", RunEvent.COMPILE_FALLBACK),
            beat=heart.beat,
        )
        loss = compiled.loss
    step = step_of(workload, state, faults, learning_rate=learning_rate, loss=loss, metrics=metrics, scaler=scaler)
    if compiled is not None:
        step.guard(compiled.guard)
    metrics.set("tolaria.train.compile_enabled", compiled is not None)
    metrics.set("tolaria.train.foreach_enabled", _runs_foreach(state))
    metrics.set("tolaria.train.graph_enabled", workload.cuda_graphs and device.type == "cuda")
    if workload.cuda_graphs:
        graphs_fell_back = fell_back("tolaria.train.graph_enabled", RunEvent.GRAPH_FALLBACK)
        _add_graphs(step, faults, device, metrics=metrics, fell_back=graphs_fell_back)
    return step


def _add_graphs(
    step: Step, faults: Faults, device: torch.device, *, metrics: Metrics, fell_back: Callable[[str], None]
) -> None:
    if device.type != "cuda":
        fell_back(f"CUDA graphs are off: this run is on a {device.type}")
        return
    from esper_runtime.tolaria.graphs import Graphs

    step.guard(Graphs(device, faults=faults, metrics=metrics, fell_back=fell_back).guard)


def _runs_foreach(state: TrainState) -> bool:
    """By request, or because torch takes it by default on a GPU."""
    for group in state.update.optimizer.param_groups:
        asked, fused = group.get("foreach"), group.get("fused")
        on_gpu = all(parameter.is_cuda for parameter in group["params"])
        if asked or ("foreach" in group and asked is None and not fused and on_gpu):
            return True
    return False
