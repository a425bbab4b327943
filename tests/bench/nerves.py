"""A pod whose nerves are measured: trainer, weatherlight, kasmina and tamiyo as processes of their own over one run
directory, a Redis with the chart's settings, what disturbs them, and the answers that they leave in the journal.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from esper_leyline import env, paths
from esper_leyline.journal import JournalReader
from esper_leyline.v1.emergency_pb2 import ACK_STAGE_DONE, ACK_STAGE_SEEN, AckStage

from tests.support.redis_server import RedisServer
from tests.support.sidecars import Sidecar, Sidecars, wait_until
from tests.support.trainers import Pod
from tests.support.weatherlight import UID, PodFiles

CODE: Final = Path(__file__).with_name("code")
MEMORY: Final = Path("/dev/shm")
TRAINER, KASMINA, TAMIYO, WEATHERLIGHT = "tolaria", "kasmina", "tamiyo", "weatherlight"
CHART: Final = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
"""Settings of Redis that matter here, as the chart has them."""
STEPS_PER_EPOCH: Final = 2000
SHOT_S: Final = 20.0
"""The longest wait for an answer."""

_DISK = """
import os, sys
file, block = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o600), os.urandom(4 << 20)
while True:
    for at in range(64):
        os.pwrite(file, block, at * len(block))
        os.fsync(file)
"""


class NervesPod:
    """`memory` is the pod's memory volume, `disk` its checkpoint volume. Nothing runs yet."""

    def __init__(self, memory: Path, disk: Path, *, redis_url: str = "", model: str = "64") -> None:
        self.sidecars = Sidecars(memory, run_uid=UID)
        self.files = PodFiles(memory, redis_url=redis_url)
        (memory / "checkpoints").symlink_to(disk)
        self.pod = Pod(memory, uid=UID).configure(entrypoint="benchload:build", checkpoint={})
        self.pod.document["config"] = {"model": model, "steps": STEPS_PER_EPOCH}
        self.pod.write_config()
        self._log = disk / "trainer.log"
        self.trainer: subprocess.Popen[bytes] | None = None
        self.weatherlight: Sidecar | None = None

    def never_ending(self, *, save_every: int) -> None:
        """Epochs are long, and the loss stays where it is: after many thousand steps a real one would spike."""
        self.pod.document["config"] |= {"steps": 0, "optimizer": "adamw-still"}
        self.pod.document["checkpoint"] = {"everySteps": save_every}
        self.pod.write_config()

    def trainer_environ(self, **more: str) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", **self.pod.environment(), env.CODE_DIR: str(CODE), **more}

    def start(self, *names: str) -> Self:
        """The named ones, all by default; each is up when this returns."""
        for name in names or (WEATHERLIGHT, KASMINA, TAMIYO, TRAINER):
            if name == TRAINER:
                self._start_trainer()
            elif name == WEATHERLIGHT:
                environ = {**os.environ, **self.files.environment}
                self.weatherlight = Sidecar(name, self.files.run_dir, environ, self.files.root / "log")
                self.weatherlight.wait_ready()
            else:
                self.sidecars.start(name)
        return self

    def _start_trainer(self) -> None:
        command = [sys.executable, "-m", "esper_runtime.tolaria.trainer"]
        with self._log.open("ab") as log:
            self.trainer = subprocess.Popen(command, env=self.trainer_environ(), stderr=log)
        wait_until(self._stepping, "the trainer trains", timeout_s=120.0)

    def _stepping(self) -> bool:
        assert self.trainer is not None
        assert self.trainer.poll() is None, f"the trainer ended: {self._log.read_text()[-2000:]}"
        beat = self.pod.heartbeat()
        return beat is not None and beat.step > 100

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.trainer is not None:
            self.trainer.kill()
            self.trainer.wait()
        if self.weatherlight is not None:
            self.weatherlight.kill()
        self.sidecars.stop()
        self.files.close()


@dataclass(frozen=True, slots=True)
class Answer:
    """When somebody came to that stage, by CLOCK_MONOTONIC, and how long after weatherlight had it."""

    at_ns: int
    elapsed_ms: float


class Answers:
    """What the pod has said about signals, from its journal."""

    def __init__(self, run_dir: Path) -> None:
        self._reader = JournalReader(run_dir / paths.JOURNAL)
        self.found: dict[tuple[str, bool], dict[tuple[str, AckStage], list[Answer]]] = {}
        """By id and whether it lifts; then by participant and stage. More than one answer would be one too many."""

    def read(self) -> None:
        for event in self._reader.events():
            if event.WhichOneof("event") == "ack":
                ack = event.ack
                answers = self.found.setdefault((ack.signal_id, ack.clear), {})
                answer = Answer(event.monotonic_ns, ack.elapsed_ms)
                answers.setdefault((ack.participant, ack.stage), []).append(answer)

    async def of(
        self, signal_id: str, *, clear: bool, participants: tuple[str, ...]
    ) -> dict[tuple[str, AckStage], list[Answer]]:
        """Once all of them are done with it."""
        deadline = time.monotonic() + SHOT_S
        while True:
            self.read()
            found = self.found.get((signal_id, clear), {})
            if all((one, ACK_STAGE_DONE) in found for one in participants):
                return found
            assert time.monotonic() < deadline, f"no answer to {signal_id} but from {sorted(found)}"
            await asyncio.sleep(0.0005)

    def close(self) -> None:
        self._reader.close()


SEEN: Final = (TRAINER, ACK_STAGE_SEEN)
ACKS: Final = ((TRAINER, ACK_STAGE_DONE), (KASMINA, ACK_STAGE_DONE), (TAMIYO, ACK_STAGE_DONE))


class KubeletMount:
    """A mounted ConfigMap with one signal, replaced as a kubelet does: a new directory, then one rename."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._number = 0
        (directory / paths.EMERGENCY_SIGNAL).symlink_to(f"..data/{paths.EMERGENCY_SIGNAL}")

    def prepare(self, content: bytes) -> None:
        self._number += 1
        version = self._directory / f"..version-{self._number}"
        version.mkdir()
        (version / paths.EMERGENCY_SIGNAL).write_bytes(content)
        (self._directory / "..data_tmp").symlink_to(version.name)

    def replace(self) -> None:
        (self._directory / "..data_tmp").rename(self._directory / "..data")
        old = self._directory / f"..version-{self._number - 1}"
        if old.exists():
            (old / paths.EMERGENCY_SIGNAL).unlink()
            old.rmdir()


# What disturbs


@contextlib.contextmanager
def disk_load(directory: Path) -> Iterator[None]:
    """Somebody who writes 4 MiB and waits for the disk, again and again."""
    path = directory / "load"
    with _beside(sys.executable, "-c", _DISK, str(path)):
        wait_until(path.exists, "the disk is written to")
        yield
    path.unlink()


@contextlib.contextmanager
def core_burnt() -> Iterator[None]:
    """One core's worth of work that never waits."""
    with _beside(sys.executable, "-c", "while True: pass"):
        yield


@contextlib.contextmanager
def redis_down(server: RedisServer) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextlib.contextmanager
def _beside(*words: str) -> Iterator[None]:
    process = subprocess.Popen(words)
    try:
        yield
        assert process.poll() is None, f"{words[:2]} ended by itself"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def places(disk: Path | None) -> Iterator[tuple[Path, Path]]:
    """A directory in memory and one on a disk: below `disk`, or where temporary files are."""
    with (
        tempfile.TemporaryDirectory(dir=MEMORY, prefix="esper-") as memory,
        tempfile.TemporaryDirectory(dir=disk, prefix="esper-") as durable,
    ):
        yield Path(memory), Path(durable)


def filesystem(path: Path) -> str:
    """What a directory lies on, such as ext4."""
    listed = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    mounts = [(point, kind) for _, point, kind, *_ in listed if path.is_relative_to(point)]
    return max(mounts, key=lambda mount: len(mount[0]))[1]


def redis_server(disk: Path, **settings: Any) -> RedisServer:
    """With the chart's settings and its files on a disk."""
    chosen: Mapping[str, Any] = {**CHART, **settings}
    return RedisServer(data_dir=disk / "redis", **chosen)
