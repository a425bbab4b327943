"""HTTP probes of a container, as its manifest declares them."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FASTEST_S = 0.1
"""While a container starts, probes run this often: on a laptop nobody else pays for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    path: str
    period_s: float
    timeout_s: float
    failure_threshold: int

    @classmethod
    def of(cls, manifest: Mapping[str, Any] | None) -> "Probe | None":
        """None when there is none, or none by HTTP."""
        if manifest is None or "httpGet" not in manifest:
            return None
        return cls(
            path=manifest["httpGet"].get("path", "/"),
            period_s=float(manifest.get("periodSeconds", 10)),
            timeout_s=float(manifest.get("timeoutSeconds", 1)),
            failure_threshold=int(manifest.get("failureThreshold", 3)),
        )

    @property
    def patience_s(self) -> float:
        """How long it may fail before the kubelet gives the container up."""
        return self.period_s * self.failure_threshold


def port_of(run_dir: Path, container: str) -> int | None:
    """The port that a container took, from the file it wrote; None before it did."""
    try:
        return int((run_dir / f"{container}.port").read_text())
    except (FileNotFoundError, ValueError):
        return None


async def answers(port: int | None, probe: Probe) -> bool:
    """Whether GET gives 2xx or 3xx in time."""
    if port is None:
        return False
    try:
        async with asyncio.timeout(probe.timeout_s):
            status = await _get_status(port, probe.path)
    except (OSError, TimeoutError, ValueError):
        return False
    return 200 <= status < 400


async def _get_status(port: int, path: str) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        line = await reader.readline()
        return int(line.split()[1])
    except IndexError:
        return 0
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def until_answers(port: Callable[[], int | None], probe: Probe) -> bool:
    """Waits for the first success; False when the probe's patience is at its end."""
    give_up = asyncio.get_running_loop().time() + max(probe.patience_s, 1.0)
    while not await answers(port(), probe):
        if asyncio.get_running_loop().time() > give_up:
            return False
        await asyncio.sleep(FASTEST_S)
    return True
