"""python -m esper_runtime.otlp: the export as a container's process; `esper nissa export` is the same for people."""

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from esper_leyline import ports
from esper_leyline.exitcodes import SidecarExit
from esper_leyline.oona import OonaConfig, OonaConfigError
from esper_leyline.oona.acl import NISSA

from esper_runtime.otlp.export import Options, serve
from esper_runtime.sidecar import logs
from esper_runtime.sidecar.environment import SettingsError


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m esper_runtime.otlp", description=__doc__)
    parser.add_argument("--otlp", required=True, metavar="URL", help="address of the receiver's logs: …/v1/logs")
    parser.add_argument("--bus", required=True, metavar="URL", help="redis://, rediss:// (TLS) or unix://")
    parser.add_argument("--username", default="", metavar="NAME")
    parser.add_argument("--password-file", type=Path, metavar="FILE")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="PEM file of who signed the server's certificate")
    parser.add_argument("--headers-file", type=Path, metavar="FILE", help="for the receiver, `Name: value` a line")
    parser.add_argument("--port", type=int, default=ports.NISSA_HTTP, help="of /livez, /readyz and /metrics")
    parser.add_argument("--name", default=socket.gethostname(), help="of this process in the group")
    given = parser.parse_args(words)
    try:
        bus = OonaConfig(
            url=given.bus, username=given.username, password=_text(given.password_file), ca=_text(given.ca)
        )
        headers = headers_of(_text(given.headers_file))
    except (OSError, UnicodeDecodeError, OonaConfigError, ValueError) as error:
        parser.error(str(error))
    return run(Options(bus=bus, otlp=given.otlp, name=given.name, port=given.port, headers=headers))


def run(options: Options) -> int:
    """Until SIGTERM or SIGINT; the exit code."""
    logs.configure(NISSA, os.environ)

    async def live() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(options, stop)

    try:
        asyncio.run(live())
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return SidecarExit.STOPPED


def headers_of(text: str) -> dict[str, str]:
    """ValueError for a line that is none."""
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise ValueError(f"a header is `Name: value`, not {line[:20]!r}")
        found[name.strip()] = value.strip()
    return found


def _text(path: Path | None) -> str:
    return "" if path is None else path.read_text(encoding="utf-8").strip()


if __name__ == "__main__":
    sys.exit(main())
