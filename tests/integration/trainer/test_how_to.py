"""docs/how-to/bring-your-own-training.md: its diff applies, is short, and trains to the same bits."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from esper_operator.api.v1alpha1 import Spec
from esper_operator.api.validate import validate
from esper_operator.model import RunKey

from tests.support import specs
from tests.support.trainers import Pod

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs/how-to/bring-your-own-training.md"
MAX_CHANGED = 10


def block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert len(found) == 1 or language == "sh"
    return found[0]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """train.py of the page after its diff, without shuffling, as an importable module."""
    path = tmp_path / "code" / "train.py"
    path.parent.mkdir()
    path.write_text(block("python"))
    (tmp_path / "code" / "change.diff").write_text(block("diff"))
    subprocess.run(["git", "apply", "-p0", "--unsafe-paths", "change.diff"], cwd=path.parent, check=True)
    text = path.read_text()
    assert "SHUFFLE = 5, 32, True" in text
    path.write_text(text.replace("SHUFFLE = 5, 32, True", "SHUFFLE = 2, 32, False"))
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    yield importlib.import_module("train")
    del sys.modules["train"]


def noted(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bits of every training loss from now on."""
    losses: list[str] = []
    plain = module.loss_of

    def loss_of(model, batch):
        loss = plain(model, batch)
        losses.append(loss.item().hex())
        return loss

    monkeypatch.setattr(module, "loss_of", loss_of)
    return losses


def test_the_change_is_short_and_takes_nothing_away():
    lines = block("diff").splitlines()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in lines if line.startswith("-") and not line.startswith("---")]
    assert removed == []
    assert 0 < len(added) <= MAX_CHANGED
    assert f"{['six', 'seven', 'eight', 'nine', 'ten'][len(added) - 6]} lines more" in PAGE.read_text()


def test_esper_trains_the_same_bits_as_the_loop(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    losses = noted(train, monkeypatch)
    train.main()
    assert capsys.readouterr().out.startswith("epoch 1: loss 0.")
    by_the_loop = list(losses)
    losses.clear()
    pod = Pod(tmp_path / "pod").configure(entrypoint="train:build")
    pod.document["config"] = {}
    pod.write_config()
    assert pod.train().exit_code == 0
    assert len(by_the_loop) == 2 * 63
    assert losses == by_the_loop


def test_the_program_runs_by_itself_before_the_change(tmp_path: Path):
    (tmp_path / "train.py").write_text(block("python"))
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("epoch 5: loss 0.")


def test_the_manifest_is_valid():
    resource = yaml.safe_load(block("yaml"))
    assert validate(Spec.parse(resource["spec"]), RunKey("team", resource["metadata"]["name"]), specs.SETTINGS) == ()


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()) if "://" not in link]
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def test_every_field_that_the_page_names_exists():
    workload = importlib.import_module("esper_runtime.workload").Workload
    named = set(re.findall(r"\b(\w+)=", PAGE.read_text().partition("## The rest of your loop")[2]))
    assert len(named) > 8
    assert named - {"num_workers", "collate_fn"} <= set(workload.__dataclass_fields__)
