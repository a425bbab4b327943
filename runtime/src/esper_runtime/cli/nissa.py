"""`esper nissa`: what leaves the message bus for observers elsewhere."""

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from esper_leyline import ports

from esper_runtime.cli.backend import BackendError
from esper_runtime.cli.bus import Authority, Context, Kubeconfig, Local, Namespace, PasswordFile, State, Url, Username

app = typer.Typer(name="nissa", help="Let observers elsewhere see what runs tell.", no_args_is_help=True)
SYSTEM = "esper-system"


@app.callback()
def _group() -> None:
    """Keeps `export` a command of its own."""


@app.command()
def export(
    otlp: Annotated[str, typer.Option(metavar="URL", help="Address of an OpenTelemetry receiver's logs: …/v1/logs.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of /metrics, /livez and /readyz.")] = ports.NISSA_HTTP,
    headers_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For the receiver, such as a token: `Name: value` a line.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of this process among those that share the work.")] = socket.gethostname(),
    url: Url = None,
    username: Username = None,
    password_file: PasswordFile = None,
    ca: Authority = None,
    namespace: Namespace = SYSTEM,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state: State = None,
    local: Local = None,
) -> None:
    """Send events of runs to an OpenTelemetry receiver, as logs, until you stop it.

    Each event arrives at least once; what the receiver refuses becomes a dead letter (`esper bus dead-letter`).
    Processes with different --name share the work. Needs the extra `otel` of esper-runtime.
    """
    if find_spec("opentelemetry") is None:
        raise BackendError(
            'this needs the extra `otel` of esper-runtime: uv pip install -e "runtime[otel]" in the repository'
        )
    from esper_runtime.cli.buslink import Reach, reached
    from esper_runtime.otlp.__main__ import headers_of, run
    from esper_runtime.otlp.export import Options

    reach = Reach(
        url=url, username=username, password_file=password_file, ca=ca, namespace=namespace, context=context,
        kubeconfig=kubeconfig, state=state, local=local,
    )  # fmt: skip
    try:
        headers = headers_of("" if headers_file is None else headers_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BackendError(f"{headers_file}: {error}") from error
    with reached(reach) as bus:
        raise typer.Exit(run(Options(bus=bus, otlp=otlp, name=name, port=port, headers=headers)))
