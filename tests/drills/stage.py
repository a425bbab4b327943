"""Where a drill is played: a real `esper run`, a Prometheus with the shipped rules, and a keeper of its Redis."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import redis
from esper_leyline.oona import Oona, OonaConfig
from esper_operator.fabric import Fabric
from esper_operator.metrics import Metrics
from esper_runtime.checkpoint import LoadedGeneration
from prometheus_client import start_http_server

from tests.drills import rules
from tests.nissa import scene
from tests.support.localruns import Laptop, Resource
from tests.support.prometheus import Prometheus, free_port
from tests.support.shim import Shim, build
from tests.support.trainers import newest
from tests.support.waiting import until_sync

CODE: Final = Path(__file__).with_name("code.py")
STEPS_PER_EPOCH: Final = 20
EPOCHS: Final = 120
PATIENCE_S: Final = 300.0
_LOOK_S: Final = 0.5


def documents(directory: Path, *, epochs: int, spec: Mapping[str, Any] | None = None) -> list[Resource]:
    """Manifest of a run of so many epochs; `spec` adds sections to its own."""
    code = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "code"},
        "data": {"drilled.py": CODE.read_text()},
    }
    runtime = {
        "entrypoint": "drilled:build",
        "codeConfigMapName": "code",
        "config": {"epochs": epochs, "directory": str(directory), "steps_per_epoch": STEPS_PER_EPOCH},
    }
    checkpoint = {"storage": {"claimTemplate": {"size": "1Gi"}}, "everySteps": 20, "memory": {"everySteps": 5}}
    given: dict[str, Any] = dict(spec or {})
    runtime |= given.pop("runtime", {})
    run = {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "EsperTrainingRun",
        "metadata": {"name": "drilled", "labels": {"drill": "yes"}},
        "spec": {
            "runtime": runtime,
            "checkpoint": checkpoint,
            "restart": {"initialBackoffSeconds": 1, "terminationGracePeriodSeconds": 30},
            **given,
        },
    }
    return [code, run]


def _variables(environment: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in environment.items()]


class Run:
    """One local run at its own pace."""

    def __init__(self, directory: Path, *, epochs: int = EPOCHS, spec: Mapping[str, Any] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.steps = epochs * STEPS_PER_EPOCH
        self.shim = Shim(build(directory), directory / ".esper", directory / "control")
        """Between the trainer and its volumes."""
        given = {**(spec or {}), "runtime": {"env": _variables(self.shim.environment)}}
        self.laptop = Laptop(directory, documents(directory, epochs=epochs, spec=given))

    def start(self) -> None:
        self.laptop.run("--stay")

    def hurry(self) -> None:
        """No more pauses: it ends as soon as it can."""
        (self.directory / "hurry").touch()

    def finish(self) -> None:
        """To its end, which must be a good one."""
        self.hurry()
        code = self.laptop.runs[-1].wait(PATIENCE_S)
        assert code == 0, f"exit code {code}: {self.laptop.said()[-1500:]}"

    def final(self) -> LoadedGeneration:
        """The newest checkpoint of a run that has ended."""
        return newest(self.laptop.state / "checkpoints", uid=self.laptop.uid())

    def close(self) -> None:
        self.laptop.close()


class Keeper:
    """What the leading operator does for the message bus, with its own code, served for Prometheus to scrape."""

    def __init__(self, url: str) -> None:
        self.port = free_port()
        self._url = url
        self._metrics = Metrics()
        self._metrics.gauge("esper_leader", 1)
        self._server, _ = start_http_server(self.port, addr="127.0.0.1", registry=self._metrics.registry)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="keeper")
        self._thread.start()

    def _run(self) -> None:
        self._keeping = self._loop.create_task(self._keep())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._keeping)
        self._loop.close()

    async def _keep(self) -> None:
        async with Oona(OonaConfig(url=self._url)) as oona:
            await Fabric(oona, self._metrics).run()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._keeping.cancel)
        self._thread.join()
        self._server.shutdown()
        self._server.server_close()


class Stage:
    """A run that trains and is watched."""

    def __init__(self, run: Run, server: Prometheus, keeper: Keeper) -> None:
        self.run = run
        self.laptop = run.laptop
        self._server = server
        self._keeper = keeper
        self._targets: scene.Targets = []
        self._look_at = 0.0

    # What is seen

    def firing(self, alert: str) -> bool:
        return bool(self._server.instant(f'ALERTS{{alertname="{alert}",alertstate="firing"}}'))

    def value(self, expr: str) -> float:
        """Of the only sample; 0 without one."""
        found = self._server.instant(expr)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else 0.0

    def events(self) -> list[dict[str, str]]:
        """What would be Kubernetes Events."""
        path = self.laptop.state / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, check: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
        """Waits; Prometheus follows the run's containers meanwhile."""

        def look() -> Any:
            self._follow()
            return check()

        try:
            return until_sync(look, timeout_s, what)
        except AssertionError as error:
            told = [f"{event['reason']}: {event['message']}" for event in self.events()[-5:]]
            raise AssertionError(f"{error}\n{json.dumps(self.laptop.status())}\n{told}") from None

    def _follow(self) -> None:
        """A container that starts again has another port."""
        if (now := time.monotonic()) < self._look_at:
            return
        self._look_at = now + _LOOK_S
        operator = (self._keeper.port, {"namespace": "esper-system", "pod": "operator"})
        with contextlib.suppress(FileNotFoundError):  # between two pods
            targets = [*scene.targets(self.laptop), operator]
            if targets != self._targets:
                self._server.targets(targets)
                self._targets = targets

    # What can be touched

    @property
    def redis_url(self) -> str:
        return f"unix://{self.laptop.scratch()[0] / 'redis.sock'}"

    @contextmanager
    def redis(self) -> "Iterator[redis.Redis]":
        with redis.Redis.from_url(self.redis_url) as client:
            yield client

    @property
    def run_dir(self) -> Path:
        return self.laptop.scratch()[0] / "run"

    def keys(self, item: str) -> Path:
        """The directory that shows `item` of the run's keys to the container that has it."""
        (found,) = {path.parent for path in self.laptop.scratch()[0].rglob(item) if path.is_symlink()}
        return found

    def train(self, steps: int) -> None:
        """Waits until it is so many steps further, as its status tells."""
        there = self.laptop.step() + steps
        self.until(lambda: self.laptop.step() >= there, f"step {there} is in the status")


@contextmanager
def staged(directory: Path, run: Run) -> Iterator[Stage]:
    """A run that trains, scraped from its first step on. It is ended at the end, whatever became of it."""
    watching = directory / "prometheus"
    watching.mkdir(parents=True)
    server = Prometheus(watching, port=free_port(), rules=rules.write(scene.RULES, watching))
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        stack.callback(run.close)
        run.start()
        server.wait_ready()
        run.laptop.until_phase("Running")
        stage = Stage(run, server, keeper := Keeper(f"unix://{run.laptop.scratch()[0] / 'redis.sock'}"))
        stack.callback(keeper.close)
        stage.train(5)
        stage.until(lambda: stage.value("count(up == 1)") == len(scene.CONTAINERS) + 1, "all are scraped")
        yield stage
