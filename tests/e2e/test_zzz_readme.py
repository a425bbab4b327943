"""README.md's commands for a cluster, as they stand; last, on a cluster without Esper."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import readme

from . import cluster as kit

VALKEY = "valkey/valkey:8.1-alpine"


@pytest.fixture
def reader(cluster: kit.Cluster, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Runs one command in the repository, with kubectl's default namespace one of its own."""
    if not cluster.own:
        pytest.skip("README's `make load` is for kind")
    config = tmp_path / "kubeconfig"
    config.write_text(cluster.kubeconfig.read_text())
    environment = {
        **os.environ,
        "KUBECONFIG": str(config),
        "KIND_CLUSTER_NAME": kit.NAME,
        "PATH": f"{kit.ROOT / '.venv/bin'}:{os.environ['PATH']}",
    }
    kit.command("docker", "tag", f"esper/valkey:{cluster.tag}", VALKEY)
    kit.command("kind", "load", "docker-image", VALKEY, "--name", kit.NAME, timeout_s=300)
    cluster.kubectl("create", "namespace", "reader")
    kit.command("kubectl", "config", "set-context", "--current", "--namespace=reader", KUBECONFIG=str(config))

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command.replace("./out", str(tmp_path / "out"))],
            cwd=kit.ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        print(f"$ {command}\n{done.stdout}{done.stderr}")
        if done.returncode:
            raise kit.Failed(f"{command} exited {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    yield run
    cluster.kubectl("delete", "namespace", "reader", "--wait=false")
    cluster.helm("uninstall", "esper", "-n", kit.SYSTEM, check=False)


@pytest.mark.timeout(2400)
def test_the_commands_for_a_cluster_do_what_they_say(
    reader: Callable[[str], str], cluster: kit.Cluster, tmp_path: Path
) -> None:
    cluster.helm("uninstall", "esper", "-n", kit.SYSTEM, "--wait", check=False)
    run = kit.RunHandle(cluster, "reader", "digits-nan")
    for command in readme.commands("On a cluster"):
        if command.endswith("-w"):
            # It has no end of its own: look until the NaN is survived.
            reader(f"timeout 5 {command} || test $? = 124")
            run.wait("the rollback", lambda s: s.get("rollbacks", {}).get("total") == 1, timeout_s=600)
        else:
            reader(command)
    assert run.phase() == "Succeeded"
    assert (tmp_path / "out/model.safetensors").stat().st_size > 1000
    (tmp_path / "shown.yaml").write_text(readme.manifest())
    assert "created (server dry run)" in reader(f"kubectl apply --dry-run=server -f {tmp_path}/shown.yaml")
