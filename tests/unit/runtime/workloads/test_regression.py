"""The regression workload: a formula that can be checked by hand, and metrics that add up over batches."""

import math

import pytest
import torch
from esper_runtime.workloads.regression import RANGES, build, measure_against, pressure_losses
from torch import nn

SMOKE = {"samples": 400, "width": 8, "epochs": 1, "batch_size": 32}


def by_hand(inputs: list[float]) -> float:
    """Pa, from SI units."""
    velocity, diameter, length, density, viscosity, roughness = inputs
    reynolds = density * velocity * diameter / viscosity
    if reynolds < 2300:
        friction = 64 / reynolds
    else:
        friction = (-1.8 * math.log10((roughness / diameter / 3.7) ** 1.11 + 6.9 / reynolds)) ** -2
    return friction * length / diameter * density * velocity**2 / 2


def test_targets_follow_the_formula_in_laminar_and_turbulent_flow():
    inputs, decades = pressure_losses(300, noise=0.0, seed=1)
    reynolds = []
    for row, found in zip(inputs.double().tolist(), decades.tolist(), strict=True):
        physical = [10**value for value in row]
        reynolds.append(physical[3] * physical[0] * physical[1] / physical[4])
        assert found == pytest.approx(math.log10(by_hand(physical)), abs=1e-4)
    assert min(reynolds) < 2300 < max(reynolds)


def test_water_in_a_smooth_pipe_loses_what_the_handbook_says():
    """1 m/s of water in 100 m of 0.1 m steel pipe: friction about 0.020 by the Moody chart, so some 10 kPa."""
    assert by_hand([1.0, 0.1, 100.0, 998.0, 1.0e-3, 4.5e-5]) == pytest.approx(0.020 * 1000 * 998 / 2, rel=0.02)


def test_samples_lie_in_their_ranges_and_depend_on_the_seed_alone():
    inputs, decades = pressure_losses(1000, noise=0.1, seed=5)
    for column, (low, high) in enumerate(RANGES.values()):
        physical = 10 ** inputs[:, column]
        assert low * 0.999 <= float(physical.min()) < float(physical.max()) <= high * 1.001
    again = pressure_losses(1000, noise=0.1, seed=5)
    assert torch.equal(inputs, again[0])
    assert torch.equal(decades, again[1])
    assert not torch.equal(inputs, pressure_losses(1000, noise=0.1, seed=6)[0])


def test_noise_has_the_deviation_that_was_asked_for():
    clean = pressure_losses(5000, noise=0.0, seed=2)[1]
    noisy = pressure_losses(5000, noise=0.05, seed=2)[1]
    assert float((noisy - clean).std()) == pytest.approx(0.05, rel=0.05)


def test_metrics_over_batches_equal_those_over_the_whole():
    torch.manual_seed(0)
    model, inputs, wanted = nn.Flatten(0), torch.randn(100, 1), torch.randn(100)
    measure = measure_against(float(wanted.var(correction=0)))
    sums: dict[str, float] = {}
    for begin in range(0, 100, 7):
        for name, (total, _) in measure(model, (inputs[begin : begin + 7], wanted[begin : begin + 7])).items():
            sums[name] = sums.get(name, 0.0) + total
    error = inputs.flatten() - wanted
    assert sums["mae"] / 100 == pytest.approx(float(error.abs().mean()), rel=1e-5)
    r2 = 1 - float((error**2).sum() / ((wanted - wanted.mean()) ** 2).sum())
    assert sums["r2"] / 100 == pytest.approx(r2, rel=1e-5)


def test_the_model_takes_and_gives_physical_values_from_the_start():
    workload = build(SMOKE)
    inputs, wanted = workload.train
    with torch.no_grad():
        found = workload.model(inputs)
    assert found.shape == wanted.shape
    assert abs(float(found.mean() - wanted.mean())) < 2 * float(wanted.std())
    assert {"input_mean", "target_deviation"} <= dict(workload.model.named_buffers()).keys()
