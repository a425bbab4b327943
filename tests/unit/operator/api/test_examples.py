"""Every example: valid for the operator as it stands, and a pod that the cluster admits."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from esper_operator import build
from esper_operator.api import restricted
from esper_operator.api.v1alpha1 import Spec
from esper_operator.api.validate import validate
from esper_operator.model import RunKey

from tests.support import specs

ROOT = Path(__file__).resolve().parents[4]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def resource(path: Path) -> dict[str, Any]:
    (found,) = [document for document in documents(path) if document["kind"] == "EsperTrainingRun"]
    return found


def test_the_promised_examples_are_there() -> None:
    expected = {"digits", "digits-nan", "chars", "regression", "code-from-configmap", "own-image", "gpu"}
    assert expected <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_builds(path: Path) -> None:
    found = resource(path)
    name = found["metadata"]["name"]
    spec = Spec.parse(found["spec"])
    assert validate(spec, RunKey("team", name), specs.SETTINGS) == ()
    job = build.job(specs.run(found["spec"], name=name), 1, specs.SETTINGS)
    assert restricted.check(job["spec"]["template"]) == ()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_explains_itself(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_the_config_maps_that_an_example_names_come_with_it() -> None:
    for path in EXAMPLES:
        wanted = resource(path)["spec"]["runtime"].get("codeConfigMapName")
        shipped = {d["metadata"]["name"] for d in documents(path) if d["kind"] == "ConfigMap"}
        assert wanted is None or wanted in shipped, path.name


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_workload_of_an_example_takes_its_config(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = pytest.importorskip("esper_runtime.workload")
    for document in documents(path):
        for name, text in document.get("data", {}).items():
            (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    runtime = resource(path)["spec"]["runtime"]
    module, _, function = runtime["entrypoint"].partition(":")
    if "image" in runtime:
        pytest.skip("its code is in an image that does not exist")
    built = getattr(importlib.import_module(module), function)(runtime["config"])
    assert isinstance(built, workload.Workload)
    assert built.epochs == runtime["config"]["epochs"]
