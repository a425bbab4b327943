"""Bad input and bad disks: a clear message with field and remedy, the right exit code, no traceback, nothing lost."""

import contextlib
import subprocess

import pytest
import yaml

from tests.support.localruns import EXAMPLES, Laptop, paced, spec_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("entrypoint", "config", "words"),
    [
        ("no_such_module:build", {}, ["no_such_module", "codeConfigMapName"]),
        ("paced:no_such_function", {}, ["no_such_function", "paced"]),
        ("paced:wrong_type", {}, ["wrong_type", "int", "Workload"]),
        ("paced:raises", {}, ["FileNotFoundError", "no data below /data/train", "raises"]),
        ("paced:build", {"epoch": 3}, ["epoch", "epochs"]),
    ],
)
def test_user_code_that_does_not_work_fails_the_run_at_once(laptop, entrypoint, config, words):
    here = laptop(paced(entrypoint=entrypoint, **config))
    here.run()
    here.ended(4)
    status = here.status()
    assert (status["phase"], status["attempt"]) == ("Failed", 1)
    assert (status["lastFailure"]["exitCode"], status["restarts"]["total"]) == (71, 0)
    for word in words:
        assert word in status["lastFailure"]["message"]
        assert word in here.said()
    assert "esper logs paced" in here.said()


@pytest.mark.parametrize(
    ("change", "field", "remedy"),
    [
        (lambda spec: spec["runtime"].pop("entrypoint"), "spec.runtime.entrypoint", "add it"),
        (lambda spec: spec["runtime"].update(entrypoint="paced.build"), "spec.runtime.entrypoint", "package.module"),
        (lambda spec: spec["runtime"].update(entrypont="a:b"), "spec.runtime.entrypont", "remove"),
        (lambda spec: spec["checkpoint"].update(periodSeconds="soon"), "spec.checkpoint.periodSeconds", "integer"),
        (lambda spec: spec["checkpoint"]["memory"].update(everySteps=-1), "spec.checkpoint.memory.everySteps", "1"),
        (lambda spec: spec.update(workers={"count": 2}), "spec.workers.count", "1"),
        (lambda spec: spec["runtime"].update(codeConfigMapName="gone"), "spec.runtime.codeConfigMapName", "--mount"),
        (lambda spec: spec["checkpoint"].update(storage={"claimName": "mine"}), "claimName", "--mount mine=DIR"),
    ],
)
def test_an_invalid_manifest_is_refused_before_anything_starts(laptop, change, field, remedy):
    documents = paced()
    change(spec_of(documents))
    here = laptop(documents)
    done = here.esper("run", str(here.manifest), "-o", "json")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert field in done.stderr
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert not (here.state / "resource.json").exists()


def test_no_manifest_at_all(laptop):
    here = laptop(paced())
    for text, remedy in (
        ("", "exactly one is needed"),
        ("a: [", "no valid YAML"),
        ("kind: Pod", "remove this document"),
    ):
        here.manifest.write_text(text)
        done = here.esper("validate", str(here.manifest))
        assert (done.returncode, done.stdout) == (2, "")
        assert remedy in done.stderr
    done = here.esper("run", "gone.yaml")
    assert done.returncode == 2
    assert "gone.yaml: No such file" in done.stderr


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_valid(laptop, example):
    here = laptop(paced())
    done = here.esper("validate", str(example))
    assert done.returncode == 0, done.stderr
    assert ": valid" in done.stderr


def test_a_second_runner_of_the_same_state_is_refused(laptop):
    here = laptop(paced())
    first = here.run()
    here.until(lambda: here.status().get("phase"), "a status")
    second = here.esper("run", str(here.manifest))
    assert second.returncode == 1
    assert f"process {first.pid} runs this already" in second.stderr
    assert "--state" in second.stderr
    fresh = here.esper("run", str(here.manifest), "--fresh")
    assert fresh.returncode == 1
    assert here.esper("resume", "paced", "--no-wait").returncode == 0
    here.until_step(1)


def test_a_state_directory_of_another_run_is_refused(laptop):
    here = laptop(paced())
    here.state.mkdir(parents=True)
    (here.state / "precious.txt").write_text("mine")
    done = here.esper("run", str(here.manifest), "--fresh")
    assert done.returncode == 1
    assert "precious.txt" in done.stderr
    assert "--state" in done.stderr
    assert (here.state / "precious.txt").read_text() == "mine"


def test_a_read_only_state_directory_is_refused(laptop, tmp_path):
    volume = tmp_path / "volume"
    volume.mkdir()
    mount(volume, "size=8m,ro")
    try:
        here = laptop(paced(), state=volume / "state")
        done = here.esper("run", str(here.manifest), "--state", str(here.state))
        assert done.returncode == 1
        assert done.stderr.strip() == (
            f"error: {here.state}: Read-only file system: choose another directory with --state"
        )
    finally:
        subprocess.run(["umount", "-l", str(volume)], check=True)


def test_a_full_disk_does_not_end_training_and_nothing_is_lost(laptop, tmp_path):
    volume = tmp_path / "volume"
    volume.mkdir()
    mount(volume, "size=16m")
    here: Laptop = laptop(paced(), state=volume / "state")
    try:
        process = here.run("--state", str(here.state))
        here.until_step(20)
        trainer = here.trainer()
        ballast = volume / "ballast"
        fill(ballast)
        here.until(lambda: "No space left on device" in here.said(), "a word about the disk")
        assert here.trainer() == trainer
        ballast.unlink()
        before = here.step()
        here.until_step(before + 20)
        here.until(lambda: here.condition("Healthy")["status"] == "True", "health again")
        assert here.trainer() == trainer
        process.terminate()
        here.ended(130)
        assert here.status()["checkpoint"]["latestVerifiedStep"] == here.step()
        assert "Traceback" not in here.said()
    finally:
        here.close()
        subprocess.run(["umount", "-l", str(volume)], check=True)


def test_a_full_disk_can_be_left(laptop, tmp_path):
    volume = tmp_path / "volume"
    volume.mkdir()
    mount(volume, "size=16m")
    here: Laptop = laptop(paced(), state=volume / "state")
    try:
        process = here.run("--state", str(here.state))
        here.until_step(20)
        fill(volume / "ballast")
        here.until(lambda: "No space left on device" in here.said(), "a word about the disk")
        process.terminate()
        here.ended(130)
        assert here.processes() == {}
        assert "Traceback" not in here.said()
    finally:
        here.close()
        subprocess.run(["umount", "-l", str(volume)], check=True)


def mount(directory, options):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(directory)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.decode().strip()}")


def fill(path):
    """Takes all the room that is left on its filesystem."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_damaged_checkpoint_is_passed_over_and_named(laptop):
    here = laptop(paced())
    process = here.run()
    here.until_step(20)
    here.until(lambda: here.status()["checkpoint"].get("count", 0) >= 2, "two checkpoints")
    process.terminate()
    here.ended(130)
    generations = sorted(here.state.glob("checkpoints/*/a00001/gen-*"))
    victim = generations[-1] / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    good = yaml.safe_load((generations[-2] / "manifest.json").read_text())["step"]
    here.run()
    here.until(lambda: here.status()["attempt"] == 2 and here.status()["phase"] == "Running", "attempt 2 trains")
    status = here.status()
    assert status["lastRecovery"]["toStep"] == good
    name = f"{generations[-1].name}/model.safetensors"
    assert name in (here.state / "events.jsonl").read_text()
    here.until(lambda: any(name in f for f in here.status()["checkpoint"]["corruptFiles"]), "the file in the status")
    assert name in here.condition("Recoverable")["message"]
