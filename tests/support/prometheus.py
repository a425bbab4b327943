"""Prometheus and promtool, where they are: on the PATH, or where scripts/prometheus-env puts them."""

import json
import os
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from tests.support.waiting import until_sync

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "esper-tools/prometheus/usr/bin"
MISSING = "no prometheus and promtool: install Debian's package prometheus, or source scripts/prometheus-env"


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(_CACHE))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """A server of its own with its data in a directory; its targets are read from a file, so they may change."""

    def __init__(self, directory: Path, *, port: int, rules: list[Path], every: str = "1s") -> None:
        self.directory = directory
        self.address = f"http://127.0.0.1:{port}"
        self._targets = directory / "targets.json"
        self.targets([])
        config = {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [
                {
                    "job_name": "esper",
                    "file_sd_configs": [{"files": [str(self._targets)], "refresh_interval": every}],
                }
            ],
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = directory / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(tool("prometheus")),
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def targets(self, found: list[tuple[int, dict[str, str]]]) -> None:
        """Ports of this machine, with the labels of each."""
        listed = [{"targets": [f"127.0.0.1:{port}"], "labels": labels} for port, labels in found]
        draft = self._targets.with_suffix(".draft")
        draft.write_text(json.dumps(listed))
        draft.replace(self._targets)

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(f"{self.address}/-/ready", timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        until_sync(ready, what="Prometheus is ready")

    def get(self, path: str, **query: str | float) -> Any:
        """`data` of an answer of the HTTP API; AssertionError with its words when it is an error."""
        address = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{query}: {error.read().decode()}") from None

    def instant(self, expr: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return found

    def series(self, expr: str, *, start: float, end: float, step: float = 1.0) -> list[dict[str, Any]]:
        """What a panel would draw from `start` to `end`."""
        found: list[dict[str, Any]] = self.get("query_range", query=expr, start=start, end=end, step=step)["result"]
        return found

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
