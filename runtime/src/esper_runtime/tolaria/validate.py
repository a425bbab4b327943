"""Evaluation of held-out data: mean loss and metrics, without gradients, with signs of life and an ear for stops."""

from collections.abc import Callable

import torch

from esper_runtime.tolaria.amp import under_autocast
from esper_runtime.tolaria.data import batch_length, in_order
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.workload import Data, Workload


def evaluate(
    workload: Workload, data: Data, *, device: torch.device, between_batches: Callable[[], Outcome | None]
) -> dict[str, float] | Outcome:
    """{"loss": mean, metric: mean, ...}, or the Outcome of a stop that came in between."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    model = workload.model
    batch_size = workload.validation_batch_size or workload.batch_size
    loss_of = under_autocast(workload.loss, workload.precision, device)
    metrics_of = None if workload.metrics is None else under_autocast(workload.metrics, workload.precision, device)
    model.eval()
    try:
        with torch.inference_mode():
            for batch in in_order(data, batch_size=batch_size, device=device, collate=workload.collate):
                outcome = between_batches()
                if outcome is not None:
                    return outcome
                length = batch_length(batch) or 1
                parts = {"loss": (float(loss_of(model, batch)) * length, length)}
                if metrics_of is not None:
                    parts.update(metrics_of(model, batch))
                for name, (total, count) in parts.items():
                    sums[name] = sums.get(name, 0.0) + total
                    counts[name] = counts.get(name, 0) + count
    finally:
        model.train()
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}
