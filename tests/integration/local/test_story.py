"""The story without a cluster: the digits example, shortened, with a NaN on purpose, from its start to the model."""

import json
import struct

import pytest
import torch
import yaml
from sklearn.datasets import load_digits
from torch.nn import functional as F

from tests.support.localruns import EXAMPLES, spec_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAN_STEP = 100
EPOCHS = 12


def shortened():
    documents = list(yaml.safe_load_all((EXAMPLES / "digits-nan.yaml").read_text()))
    spec = spec_of(documents)
    spec["runtime"]["config"] |= {"epochs": EPOCHS, "width": 8, "hidden": 64, "learning_rate": 0.004}
    spec["checkpoint"]["periodSeconds"] = 2
    spec["faultInjection"][0]["step"] = NAN_STEP
    return documents


def test_a_run_survives_a_nan_and_brings_home_a_good_model(laptop, tmp_path):
    here = laptop(shortened())
    run = here.run("-o", "json")
    here.until(lambda: list(here.state.glob("logs/*/tolaria.log")), "a log")
    watching = here.spawn("status", "digits-nan", "--watch")
    following = here.spawn("logs", "digits-nan", "--follow")
    here.ended(0, run)
    here.ended(0, watching)
    here.ended(0, following)
    resource = json.loads(here.output(0).read_text())
    assert resource == here.resource()
    told(resource["status"], here.said(0))
    assert "RollingBack -> Running" in here.output(1).read_text()
    assert "exit 0: Complete" in here.output(2).read_text()
    commands(here)
    fetched = here.esper("fetch", "digits-nan", "out")
    assert fetched.returncode == 0, fetched.stderr
    files = [tmp_path / line for line in fetched.stdout.split()]
    assert sorted(f.name for f in files) == ["model.json", "model.safetensors"]
    measured = held_out_accuracy(read_safetensors(tmp_path / "out/model.safetensors"))
    described = json.loads((tmp_path / "out/model.json").read_text())
    assert measured >= 0.95
    assert measured == pytest.approx(described["metrics"]["validation_accuracy"], abs=1e-4)
    complete = here.condition("Complete")["message"]
    assert f"step {described['step']}: " in complete
    last = here.status()["progress"]["step"]
    assert described["step"] == last or f"trained to step {last}, the best model is of step" in complete
    assert f"validation_accuracy {measured:.4f}" in complete
    assert complete in here.said(0)
    anew(here)


def told(status, said):
    assert status["phase"] == "Succeeded"
    assert [c["status"] for c in status["conditions"] if c["type"] in ("Complete", "Finished")] == ["True", "True"]
    assert status["rollbacks"]["total"] == 1
    moves = [(entry.get("from"), entry["to"]) for entry in status["history"]]
    assert moves == [
        (None, "Pending"),
        ("Pending", "Starting"),
        ("Starting", "Running"),
        ("Running", "RollingBack"),
        ("RollingBack", "Running"),
        ("Running", "Succeeded"),
    ]
    recovery = status["lastRecovery"]
    assert (recovery["kind"], recovery["cause"], recovery["fromStep"]) == ("InProcess", "NonFiniteLoss", NAN_STEP)
    assert 0 < recovery["toStep"] < NAN_STEP
    assert recovery["detectMilliseconds"] is not None
    for line in ("Running -> RollingBack", "RollingBack -> Running", "validation_accuracy", "esper fetch digits-nan"):
        assert line in said


def commands(here):
    """What other commands say about a run that has ended."""
    assert "Succeeded" in here.esper("list").stdout
    described = here.esper("status", "digits-nan").stdout
    assert "RollingBack" in described
    assert yaml.safe_load(here.esper("status", "digits-nan", "-o", "yaml").stdout) == here.resource()
    assert "training starts" in here.esper("logs", "digits-nan").stdout
    assert here.esper("logs", "digits-nan", "-c", "weatherlight", "--tail", "1").stdout.count("\n") == 1
    halted = here.esper("halt", "digits-nan")
    assert halted.returncode == 1
    assert "Succeeded" in halted.stderr
    again = here.esper("run", str(here.manifest))
    assert again.returncode == 0
    assert "--fresh" in again.stderr


def anew(here):
    old = here.uid()
    process = here.run("--fresh")
    here.until(lambda: here.uid() != old and here.status().get("phase"), "another run")
    assert here.status()["phase"] != "Succeeded"
    assert not list(here.state.glob("checkpoints/*/export"))
    process.terminate()
    here.ended(130)


def read_safetensors(path):
    """The format by its description, without our code."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kinds = {"F32": torch.float32, "I64": torch.int64}
    return {
        name: torch.frombuffer(bytearray(data[slice(*entry["data_offsets"])]), dtype=kinds[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def held_out_accuracy(t):
    digits = load_digits()
    held_out = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[:360]
    x = torch.tensor(digits.images, dtype=torch.float32)[held_out].unsqueeze(1) / 16
    for convolution, norm in (("features.0", "features.1"), ("features.3", "features.4")):
        x = F.conv2d(x, t[f"{convolution}.weight"], t[f"{convolution}.bias"], padding=1)
        mean, variance = t[f"{norm}.running_mean"], t[f"{norm}.running_var"]
        x = F.relu(F.batch_norm(x, mean, variance, t[f"{norm}.weight"], t[f"{norm}.bias"]))
    x = F.max_pool2d(x, 2).flatten(1)
    x = F.relu(F.linear(x, t["classifier.0.weight"], t["classifier.0.bias"]))
    scores = F.linear(x, t["classifier.3.weight"], t["classifier.3.bias"])
    right = scores.argmax(dim=1) == torch.tensor(digits.target)[held_out]
    return float(right.float().mean())
