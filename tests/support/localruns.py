"""`esper run` and its sister commands as real processes, with everything a test asks about them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from esper_leyline import env
from esper_runtime.local.process import kill_marked, marked
from esper_runtime.local.state import StateDir

from tests.support.waiting import until_sync

ESPER = Path(sys.executable).with_name("esper")
EXAMPLES = Path(__file__).parents[2] / "examples"
PACED = Path(__file__).with_name("pacedcode.py")
PATIENCE_S = 120.0
"""For one condition. A quiet machine needs a tenth of it; a busy one is no failure."""

Resource = dict[str, Any]


def paced(*, name: str = "paced", entrypoint: str = "paced:build", **config: Any) -> list[Resource]:
    """A manifest of a run that goes on until a test ends it; saves every second, snapshots every 5 steps."""
    code = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "code"},
        "data": {"paced.py": PACED.read_text()},
    }
    run = {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "EsperTrainingRun",
        "metadata": {"name": name},
        "spec": {
            "runtime": {"entrypoint": entrypoint, "codeConfigMapName": "code", "config": config},
            "checkpoint": {
                "storage": {"claimTemplate": {"size": "1Gi"}},
                "periodSeconds": 1,
                "memory": {"everySteps": 5},
            },
            "restart": {"initialBackoffSeconds": 1, "terminationGracePeriodSeconds": 30},
        },
    }
    return [code, run]


def spec_of(documents: Sequence[Resource]) -> Resource:
    """The spec of the run among the documents of a manifest."""
    return next(d["spec"] for d in documents if d["kind"] == "EsperTrainingRun")


class Laptop:
    """A working directory with one manifest, and the commands that are given there."""

    def __init__(self, directory: Path, documents: Sequence[Resource], *, state: Path | None = None) -> None:
        self.directory = directory
        self.manifest = directory / "manifest.yaml"
        self.write(documents)
        metadata = next(d["metadata"] for d in documents if d["kind"] == "EsperTrainingRun")
        self.name: str = metadata["name"]
        self.state = state or directory / ".esper" / metadata.get("namespace", "default") / self.name
        self.runs: list[subprocess.Popen[str]] = []

    def write(self, documents: Sequence[Resource]) -> None:
        self.manifest.write_text(yaml.safe_dump_all(documents, sort_keys=False))

    # Commands

    def run(self, *options: str, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
        """Starts `esper run`; its output goes to out.N and err.N."""
        return self.spawn("run", str(self.manifest), *options, environment=environment)

    def spawn(self, *words: str, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
        number = len(self.runs)
        with self.output(number).open("w") as out, self.errors(number).open("w") as err:
            process = subprocess.Popen(
                [str(ESPER), *words],
                cwd=self.directory,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
                preexec_fn=_heed_signals,
            )
        self.runs.append(process)
        return process

    def esper(self, *words: str, environment: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        """One command to its end."""
        return subprocess.run(
            [str(ESPER), *words],
            cwd=self.directory,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def output(self, number: int | None = None) -> Path:
        """Standard output of an `esper run`, the last one by default."""
        return self.directory / f"out.{len(self.runs) - 1 if number is None else number}"

    def errors(self, number: int | None = None) -> Path:
        return self.directory / f"err.{len(self.runs) - 1 if number is None else number}"

    def said(self, number: int | None = None) -> str:
        """Standard error of an `esper run`, the last one by default."""
        return self.errors(number).read_text()

    def ended(self, code: int, process: "subprocess.Popen[str] | None" = None) -> None:
        """Waits for the end of the last `esper run`, which must be with this exit code."""
        found = (process or self.runs[-1]).wait(PATIENCE_S)
        assert found == code, f"exit code {found}, not {code}\n{self.said()}"

    # What is seen

    def resource(self) -> Resource:
        try:
            found: Resource = json.loads((self.state / "resource.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def status(self) -> Resource:
        return dict(self.resource().get("status") or {})

    def uid(self) -> str:
        """Empty while there is no run."""
        return str(self.resource().get("metadata", {}).get("uid", ""))

    def step(self) -> int:
        return int(self.status().get("progress", {}).get("step") or 0)

    def condition(self, kind: str) -> Resource:
        return next((c for c in self.status().get("conditions", ()) if c["type"] == kind), {})

    def moves(self) -> list[tuple[str | None, str]]:
        """History as (from, to)."""
        return [(entry.get("from"), entry["to"]) for entry in self.status().get("history", ())]

    def until(self, check: Callable[[], Any], what: str = "") -> Any:
        """Waits for a condition; when the last `esper run` ends first, or time does, its words are shown."""
        alive = self.runs[-1].poll() is None if self.runs else False

        def look() -> Any:
            found = check()
            if not found and alive and (code := self.runs[-1].poll()) is not None:
                found = check()
                assert found, f"`esper run` ended with {code} before {what or 'the condition'}\n{self.said()}"
            return found

        try:
            return until_sync(look, PATIENCE_S, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said() if self.runs else ''}\n{json.dumps(self.status())}") from None

    def until_step(self, step: int) -> int:
        return int(self.until(lambda: (now := self.step()) >= step and now, f"step {step}"))

    def until_phase(self, phase: str) -> Resource:
        found: Resource = self.until(lambda: (s := self.status()).get("phase") == phase and s, f"phase {phase}")
        return found

    # Processes

    def processes(self) -> dict[int, list[str]]:
        """Every living process of the run's pods, with its command line."""
        return {pid: command for pid in marked(env.RUN_UID, self.uid()) if (command := command_line(pid))}

    def pids(self, module: str) -> list[int]:
        """Processes of the pod that run this Python module, the oldest first."""
        return sorted(pid for pid, words in self.processes().items() if module in words)

    def supervisor(self) -> int:
        return self.only("esper_runtime.tolaria")

    def trainer(self) -> int:
        return self.only("esper_runtime.tolaria.trainer")

    def only(self, module: str) -> int:
        """The one process of a module, once there is one."""
        return int(self.until(lambda: (found := self.pids(module)) and found[0], f"a process of {module}"))

    def guards(self) -> list[int]:
        """The helper beside the runner, if it is there."""
        return [pid for pid in children(self.runs[-1].pid) if "esper_runtime.local.guard" in command_line(pid)]

    def guard(self) -> int:
        return int(self.until(lambda: (found := self.guards()) and found[0], "the guard"))

    def valkey(self) -> int:
        return int(self.until(lambda: (found := children(self.guard())) and found[0], "Valkey"))

    def until_gone(self, pid: int) -> None:
        self.until(lambda: not command_line(pid), f"the end of process {pid}")

    def scratch(self) -> list[Path]:
        """Directories outside the state that live as long as the runner."""
        return [Path(path) for path in json.loads((self.state / "scratch.json").read_text())]

    def close(self) -> None:
        """Ends everything, whatever state the test left it in."""
        for process in self.runs:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        if (self.state / "resource.json").exists():
            kill_marked(env.RUN_UID, self.uid())
            StateDir(self.state).forget_scratch()


def _heed_signals() -> None:
    """Whatever the test runner itself ignores."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def command_line(pid: int) -> list[str]:
    """Empty when there is no such process, or it is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
