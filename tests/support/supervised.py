"""A supervisor as a real process over temporary directories, with a fake trainer and a fake weatherlight."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper_leyline import env, paths
from esper_leyline.journal import JournalReader
from esper_leyline.pages import EmergencyPage, EmergencyRecord, Heartbeat, Page, PageError
from esper_leyline.v1 import report_pb2 as pb
from esper_runtime.checkpoint.volume import RECORD_FILE
from esper_runtime.cli.report import report
from esper_runtime.tolaria.record import read

from tests.support.refusal import SPARES, STARTS
from tests.support.waiting import PATIENT_S, until_sync

DEADLINE_S = PATIENT_S
_RUN = """
import os, pathlib, sys
from esper_runtime.tolaria.__main__ import main
from esper_runtime.tolaria.supervisor import hang, loop, spare
from tests.support.refusal import at_limit
at_limit(pathlib.Path({run_dir!r}))
sys.executable = {python!r}
{prelude}
loop.TICK_S = {tick_s}
hang.LOOK_S = max(hang.LOOK_S, {tick_s} - 1.0)
spare.SETTLE_S = {settle_s}
spare.BACKOFF_S = spare.SHORTAGE_BACKOFF_S = spare.TAKEN_LIMIT_S = {spare_limit_s}
sys.exit(main(os.environ, trainer_module={module!r}))
"""


class Supervised:
    """Everything that belongs to one supervisor under test."""

    def __init__(self, directory: Path, *, trainer_module: str = "tests.support.fake_trainer") -> None:
        self.run_dir = directory / "run"
        self.checkpoints = directory / "checkpoints"
        self.termination_log = directory / "termination-log"
        self.config = {"version": 1, "name": "demo", "namespace": "default", "uid": "uid-1", "entrypoint": "a:b"}
        self.environ: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.python = sys.executable
        """What the supervisor starts trainers with."""
        self.prelude = ""
        """Statements that the supervisor runs first, such as one that makes it die at a chosen place."""
        self.log: Path | None = None
        """Where the container's standard error goes; None: to ours."""
        self._directory = directory
        self._module = trainer_module
        self.run_dir.mkdir()
        self.checkpoints.mkdir()

    def start(
        self,
        plans: Sequence[Mapping[str, Any]] = ({},),
        *,
        tick_s: float = 1.0,
        settle_s: float = 1e9,
        spare_limit_s: float = 60.0,
        **config: Any,
    ) -> None:
        """`tick_s`: how often the supervisor looks without being told to; `settle_s`: training before a spare."""
        config_file = self._directory / "run.json"
        config_file.write_text(json.dumps({**self.config, **config}))
        environ = {
            **os.environ,
            env.CONFIG_FILE: str(config_file),
            env.RUN_UID: "uid-1",
            env.ATTEMPT: "1",
            env.RUN_DIR: str(self.run_dir),
            env.CHECKPOINT_DIR: str(self.checkpoints),
            env.TERMINATION_LOG: str(self.termination_log),
            env.HTTP_PORT: "0",
            env.GRACE_SECONDS: "5",
            "FAKE_TRAINER": json.dumps(list(plans)),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **self.environ,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._program(tick_s=tick_s, settle_s=settle_s, spare_limit_s=spare_limit_s)],
            env=environ,
            stderr=None if self.log is None else self.log.open("ab"),
        )

    def _program(self, **limits: float) -> str:
        return _RUN.format(
            module=self._module, python=self.python, run_dir=str(self.run_dir), prelude=self.prelude, **limits
        )

    def refuse(self, *, starts: int = 0, spares: int = 0) -> None:
        """So many of them fail from now on, as at a limit of processes."""
        for name, count in ((STARTS, starts), (SPARES, spares)):
            (self.run_dir / f".{name}").write_text(str(count))
            (self.run_dir / f".{name}").replace(self.run_dir / name)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        assert self.process is not None
        return self.process.wait(deadline_s)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def started(self, number: int) -> dict[str, Any]:
        """What the trainer's start `number` found in its environment, once it has begun."""
        path = self.run_dir / f"start-{number}.json"

        def read() -> dict[str, Any] | None:
            try:
                return dict(json.loads(path.read_text()))
            except (FileNotFoundError, ValueError):
                return None

        found: dict[str, Any] = until_sync(read, DEADLINE_S, f"start {number} of the trainer")
        return found

    def beat(self) -> Heartbeat | None:
        try:
            page = Page.open(self.run_dir / paths.TRAINER_PAGE)
        except PageError:
            return None
        try:
            return Heartbeat.of(page.read())
        finally:
            page.close()

    def stepped(self, pid: int, step: int) -> None:
        """Waits until the trainer `pid` has made `step`."""

        def there() -> bool:
            beat = self.beat()
            return beat is not None and beat.pid == pid and beat.step >= step

        until_sync(there, DEADLINE_S, f"step {step} of {pid}")

    def started_training(self, step: int) -> None:
        """Waits until some trainer has made `step`."""
        until_sync(lambda: (beat := self.beat()) is not None and beat.step >= step, 3 * DEADLINE_S, f"step {step}")

    def events(self) -> list[pb.RuntimeEvent]:
        reader = JournalReader(self.run_dir / paths.JOURNAL)
        try:
            return list(reader.events())
        finally:
            reader.close()

    def record(self) -> list[dict[str, Any]]:
        """Lines of the run's record; none before there is a file."""
        path = self.checkpoints / "uid-1" / RECORD_FILE
        return list(read(path)) if path.exists() else []

    def report(self) -> str:
        """What `esper report` says of the volume."""
        return report(str(self.checkpoints), html=None, namespace=None, state=None)

    def last_word(self) -> dict[str, Any]:
        return dict(json.loads(self.termination_log.read_text()))

    def metric(self, name: str) -> float | None:
        """Of the supervisor's /metrics; None without it, or before the supervisor listens."""
        try:
            port = int((self.run_dir / "tolaria.port").read_text())
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE_S) as answer:
                lines = answer.read().decode().splitlines()
        except (OSError, ValueError):
            return None
        return next((float(line.split()[1]) for line in lines if line.startswith(f"esper_tolaria_{name} ")), None)

    def spare(self) -> int:
        """PID of the spare, once it is ready."""
        until_sync(lambda: self.metric("spare_ready") == 1, 3 * DEADLINE_S, "a spare")
        return next(pid for pid in self.children() if "esper-spare" in Path(f"/proc/{pid}/comm").read_text())

    def children(self) -> list[int]:
        """Living processes of the supervisor."""
        assert self.process is not None
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def halt(self, record: EmergencyRecord) -> None:
        """What weatherlight does, without its poke."""
        page = EmergencyPage.create(self.run_dir / paths.EMERGENCY_PAGE)
        page.publish(record)
        page.close()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_S)


class FakeWeatherlight:
    """The listening end of weatherlight.sock."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / paths.WEATHERLIGHT_SOCKET
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._listener.settimeout(DEADLINE_S)
        self._peer: socket.socket | None = None

    def accept(self) -> str:
        """Waits for the supervisor and gives its greeting."""
        self._peer, _ = self._listener.accept()
        self._peer.settimeout(DEADLINE_S)
        greeting = b""
        while not greeting.endswith(b"\n"):
            greeting += self._peer.recv(100)
        return greeting.decode()

    def poke(self) -> None:
        assert self._peer is not None
        self._peer.send(b"e")

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        assert self._peer is not None
        received = b""
        while chunk := self._peer.recv(100):
            received += chunk
        return received

    def close(self) -> None:
        for end in (self._peer, self._listener):
            if end is not None:
                end.close()
