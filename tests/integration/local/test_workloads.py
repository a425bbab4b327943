"""The examples of the shipped workloads on this machine, sidecars and all, at a size of seconds; then their report."""

import json

import pytest
import yaml

from tests.support.localruns import EXAMPLES, spec_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SMALL = {
    "chars.yaml": {"layers": 1, "width": 32, "heads": 2, "context": 32, "max_chars": 20_000, "epochs": 2},
    "regression.yaml": {"samples": 2000, "epochs": 3},
}
MEASURED = {"chars.yaml": "validation_bits_per_char", "regression.yaml": "validation_mae"}


@pytest.mark.parametrize("example", SMALL)
def test_a_shipped_workload_trains_to_its_model_and_its_report(laptop, tmp_path, example):
    documents = list(yaml.safe_load_all((EXAMPLES / example).read_text()))
    spec = spec_of(documents)
    spec["runtime"]["config"] |= SMALL[example]
    spec["faultInjection"] = [{"kind": "NonFiniteLoss", "step": 12}]
    here = laptop(documents)
    here.run()
    here.ended(0)
    assert here.status()["rollbacks"]["total"] == 1
    assert here.esper("fetch", here.name, "out").returncode == 0
    described = json.loads((tmp_path / "out/model.json").read_text())
    assert described["metrics"][MEASURED[example]] > 0
    report = here.esper("report", here.name, "--html", "page.html")
    assert report.returncode == 0, report.stderr
    assert "wrote page.html" in report.stderr
    assert "NonFiniteLoss" in report.stdout
    assert "EPOCH" in report.stdout
    assert "<svg" in (tmp_path / "page.html").read_text()
