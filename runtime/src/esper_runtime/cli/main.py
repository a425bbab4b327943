"""The commands and their options. Everything heavy is imported by the command that needs it."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from esper_leyline.exitcodes import CliExit

from esper_runtime.cli import bus, checkpoint, nissa
from esper_runtime.cli.backend import Backend, BackendError, Place, choose
from esper_runtime.cli.output import Format, say
from esper_runtime.local.errors import LocalError, ManifestError

app = typer.Typer(
    name="esper",
    help="Fault-tolerant PyTorch training: on this machine with `esper run`, on a cluster with kubectl.\n\n"
    "All commands but `run` work on both: on this machine when the run is here, else on the cluster.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the run.")]
Manifest = Annotated[
    str, typer.Argument(metavar="MANIFEST", help="Manifest with one EsperTrainingRun; - is standard input.")
]
Output = Annotated[Format, typer.Option("-o", "--output", help="How to show the result.")]
Namespace = Annotated[str | None, typer.Option("-n", "--namespace", metavar="NAME", help="Namespace of the run.")]
Context = Annotated[str | None, typer.Option(metavar="NAME", help="Context of the kubeconfig.")]
Kubeconfig = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Cluster and credentials; by default $KUBECONFIG.")
]
State = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Everything of a run on this machine; by default .esper/<namespace>/<name>."),
]
Local = Annotated[
    bool | None,
    typer.Option("--local/--cluster", help="Where to look; by default here if the run is here, else the cluster."),
]
Mount = Annotated[
    list[str] | None,
    typer.Option("--mount", metavar="NAME=DIR", help="Directory for a claim, ConfigMap or Secret that the run names."),
]
OperatorNamespace = Annotated[str, typer.Option(metavar="NAME", help="Where the operator runs; for broadcasts.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the run has followed.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait at most.")]


@app.command()
def run(
    manifest: Manifest,
    output: Annotated[
        Format | None, typer.Option("-o", "--output", help="Print the final resource on standard output.")
    ] = None,
    namespace: Namespace = None,
    state: State = None,
    mount: Mount = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget an earlier run of this name, its checkpoints too.")
    ] = False,
    no_redis: Annotated[bool, typer.Option("--no-redis", help="Start no Valkey; halts go by file alone.")] = False,
    stay: Annotated[
        bool, typer.Option("--stay", help="When halted, wait to be resumed instead of ending with 3.")
    ] = False,
) -> None:
    """Train on this machine, without a cluster. The same command again resumes.

    Ctrl-C saves a checkpoint and stops; a second one stops at once.

    \b
    Exit codes:
        0  Succeeded
        1  it could not be run; the message says why
        2  invalid manifest or options
        3  Halted; `esper resume` goes on
        4  Failed
      130  stopped by hand
    """
    from esper_runtime.cli.run import RunRequest, run_manifest

    request = RunRequest(
        manifest=manifest,
        namespace=namespace,
        state=state,
        mounts=_mounts(mount or []),
        fresh=fresh,
        redis=not no_redis,
        stay_halted=stay,
        output=output,
    )
    raise typer.Exit(run_manifest(request))


@app.command()
def validate(
    manifest: Manifest,
    namespace: Namespace = None,
) -> None:
    """Check a manifest without running it.

    The schema and rules are the cluster's. Exit code 2 when something is wrong.
    """
    from esper_runtime.cli.run import validate_manifest

    raise typer.Exit(validate_manifest(manifest, namespace))


@app.command("list")
def list_runs(
    output: Output = Format.TABLE,
    namespace: Namespace = None,
    all_namespaces: Annotated[bool, typer.Option("-A", "--all-namespaces", help="Runs of all namespaces.")] = False,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state: State = None,
    local: Local = None,
) -> None:
    """List runs: this machine's if it has any, else the cluster's."""
    from esper_runtime.cli.watching import list_runs as listing

    backend = choose(Place(namespace, context, kubeconfig, state, local))
    listing(backend, output, all_namespaces=all_namespaces)


@app.command()
def status(
    name: Name,
    output: Output = Format.TABLE,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Follow the run until it ends.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state: State = None,
    local: Local = None,
) -> None:
    """Show one run: its columns, conditions and history."""
    from esper_runtime.cli.watching import show_status

    show_status(_backend(name, namespace, context, kubeconfig, state, local), name, output, watch=watch)


@app.command()
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as the log grows.")] = False,
    container: Annotated[
        str, typer.Option("-c", "--container", help="tolaria, weatherlight, kasmina or tamiyo.")
    ] = "tolaria",
    tail: Annotated[int | None, typer.Option(min=0, help="Only the last lines.")] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state: State = None,
    local: Local = None,
) -> None:
    """Print the log of a container of the newest pod."""
    backend = _backend(name, namespace, context, kubeconfig, state, local)
    for chunk in backend.logs(name, container=container, follow=follow, tail=tail):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


@app.command()
def halt(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of the run, unless -l or --all.")] = None,
    mode: Annotated[
        Literal["Freeze", "Checkpoint", "Kill"],
        typer.Option(help="Freeze keeps the pods, Checkpoint saves and stops, Kill stops at once."),
    ] = "Checkpoint",
    selector: Annotated[str, typer.Option("-l", "--selector", help="All runs with these labels: team=vision.")] = "",
    every: Annotated[bool, typer.Option("--all", help="All runs of the namespace.")] = False,
    all_namespaces: Annotated[bool, typer.Option("-A", "--all-namespaces", help="With -l or --all.")] = False,
    reason: Annotated[str, typer.Option(help="With -l or --all on a cluster: said by the status of each run.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which runs would stop; change nothing.")] = False,
    operator_namespace: OperatorNamespace = "esper-system",
    wait: Wait = True,
    timeout: Timeout = 60.0,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state: State = None,
    local: Local = None,
) -> None:
    """Stop runs now. They stay stopped until `esper resume`.

    With -l or --all on a cluster it is a broadcast: it also holds for runs that are created while it stands.
    """
    from esper_runtime.cli.control import halt_one, halt_selected

    backend = _backend(name, namespace, context, kubeconfig, state, local)
    wait_s = timeout if wait else 0.0
    if name is not None:
        if selector or every or all_namespaces:
            raise BackendError("give a NAME, or -l or --all, not both")
        halt_one(backend, name, mode, reason=reason, dry_run=dry_run, wait_s=wait_s)
    elif selector or every:
        halt_selected(
            backend,
            selector=selector,
            all_namespaces=all_namespaces,
            mode=mode,
            reason=reason,
            operator_namespace=operator_namespace,
            dry_run=dry_run,
            wait_s=wait_s,
        )
    else:
        raise BackendError("say what to halt: a NAME, -l LABELS, or --all")


@app.command()
def resume(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of the run, unless --broadcast.")] = None,
    broadcast: Annotated[str | None, typer.Option(metavar="ID", help="Lift this broadcast instead.")] = None,
    operator_namespace: OperatorNamespace = "esper-system",
    wait: Wait = True,
    timeout: Timeout = 120.0,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state: State = None,
    local: Local = None,
) -> None:
    """Lift a halt or a suspension.

    A run of this machine whose `esper run` has ended goes on in the foreground.
    """
    from esper_runtime.cli.control import resume as do
    from esper_runtime.cli.many import resume_broadcast

    backend = _backend(name, namespace, context, kubeconfig, state, local)
    if broadcast is not None:
        resume_broadcast(backend, broadcast, operator_namespace=operator_namespace)
    elif name is not None:
        raise typer.Exit(do(backend, name, wait_s=timeout if wait else 0.0))
    else:
        raise BackendError("say what to resume: a NAME, or --broadcast ID")


@app.command()
def suspend(
    name: Name,
    wait: Wait = True,
    timeout: Timeout = 180.0,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state: State = None,
    local: Local = None,
) -> None:
    """Release the pods of a run and keep its state. `esper resume` goes on."""
    from esper_runtime.cli.control import suspend as do

    do(_backend(name, namespace, context, kubeconfig, state, local), name, wait_s=timeout if wait else 0.0)


@app.command()
def fetch(
    name: Name,
    destination: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; made when absent.")],
    image: Annotated[
        str | None, typer.Option(help="Image for the reader pod; by default the one the run's sidecars had.")
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state: State = None,
    local: Local = None,
) -> None:
    """Bring the exported model home, its digest checked."""
    backend = _backend(name, namespace, context, kubeconfig, state, local)
    for path in backend.fetch(name, destination, image=image):
        typer.echo(path)


@app.command()
def report(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|DIR", help="A run of this machine, or a directory: its state, or its volume's copy."
        ),
    ],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with the loss curve.")
    ] = None,
    namespace: Namespace = None,
    state: State = None,
) -> None:
    """Tell what became of a run, from its record.

    Phases with their times, rollbacks with causes, epochs, checkpoints, goodput. Works while the run trains and long
    after; needs no cluster.
    """
    from esper_runtime.cli.report import report as story

    typer.echo(story(target, html=html, namespace=namespace, state=state))


app.add_typer(checkpoint.app)
app.add_typer(bus.app)
app.add_typer(nissa.app)


@app.command()
def crd() -> None:
    """Print the CustomResourceDefinition.

    For `esper crd | kubectl apply --server-side -f -`.
    """
    from esper_operator.api.crd import manifest as definition

    from esper_runtime.cli.output import document

    typer.echo(document(definition(), Format.YAML))


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(f"esper {installed('esper-runtime')}")


def _backend(
    name: str | None,
    namespace: str | None,
    context: str | None,
    kubeconfig: Path | None,
    state: Path | None,
    local: bool | None,
) -> Backend:
    return choose(Place(namespace, context, kubeconfig, state, local), name)


def _mounts(texts: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise ManifestError(f"--mount {text}: write NAME=DIR")
        found[name] = Path(directory)
    return found


def main() -> None:
    """Entry point of `esper` and `kubectl-esper`."""
    sys.exit(guarded(lambda: app(standalone_mode=False)))


_ELSEWHERE = "choose another directory with --state"
_REMEDIES = {
    errno.ENOSPC: f"free some space, or {_ELSEWHERE}",
    errno.EDQUOT: f"free some space, or {_ELSEWHERE}",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
}


def guarded(call: Callable[[], int | None]) -> int:
    """Runs a command; errors become one message on standard error and an exit code."""
    from typer._click.exceptions import ClickException

    try:
        return call() or 0
    except typer.Abort:
        return CliExit.INTERRUPTED
    except ClickException as error:
        error.show()
        return error.exit_code
    except ManifestError as error:
        for problem in error.problems:
            say(f"error: {problem}")
        return CliExit.INVALID
    except (BackendError, LocalError) as error:
        say(f"error: {error}")
        return CliExit.ERROR
    except KeyboardInterrupt:
        return CliExit.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`esper logs | head`): nothing is left to say.
        sys.stderr.close()
        return CliExit.SUCCEEDED
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        say(f"error: {error.filename or 'output'}: {error.strerror}: {remedy}")
        return CliExit.ERROR


if __name__ == "__main__":
    main()
