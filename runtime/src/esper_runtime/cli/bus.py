"""`esper bus`: looks into the message bus, and sends dead letters back. Changes nothing else."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from esper_leyline.exitcodes import CliExit

from esper_runtime.cli.backend import BackendError
from esper_runtime.cli.output import Format, document, say

if TYPE_CHECKING:
    from esper_leyline.oona import Kept, Oona, Stream
    from esper_leyline.signing import Verifier

    from esper_runtime.cli.buslink import Reach

T = TypeVar("T")

app = typer.Typer(
    name="bus",
    help="Look into the message bus (Redis), and send dead letters back.\n\n"
    "Reached by --url, by the socket of an `esper run` on this machine, or through the\n"
    "cluster: then you need the right to read the operator's Secret and to forward a port.",
    no_args_is_help=True,
)

StreamName = Annotated[
    str, typer.Argument(metavar="STREAM", help="Such as oona.reports, telemetry, or signals.<run uid>.")
]
Output = Annotated[Format, typer.Option("-o", "--output", help="How to show it.")]
Url = Annotated[str | None, typer.Option(metavar="URL", help="redis://, rediss:// (TLS) or unix://.")]
Username = Annotated[str | None, typer.Option(metavar="NAME", help="User at --url.")]
PasswordFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Password at --url.")]
Authority = Annotated[
    Path | None, typer.Option("--ca", metavar="FILE", help="PEM file of who signed the certificate at --url.")
]
Namespace = Annotated[str, typer.Option("-n", "--namespace", metavar="NAME", help="Namespace of the operator.")]
Context = Annotated[str | None, typer.Option(metavar="NAME", help="Context of the kubeconfig.")]
Kubeconfig = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Cluster and credentials; by default $KUBECONFIG.")
]
State = Annotated[Path | None, typer.Option(metavar="DIR", help="State of a run on this machine.")]
Local = Annotated[bool | None, typer.Option("--local/--cluster", help="Where to look when --url is not given.")]
PublicKey = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Public keys, a hex line each, to check signatures with (Secret <run>-keys)."),
]
RunUid = Annotated[str | None, typer.Option("--run", metavar="UID", help="Only messages of this run.")]
SYSTEM = "esper-system"
_PAGE = 100
"""Letters per read."""


class Whose(StrEnum):
    """Of a user in Redis."""

    OPERATOR = "operator"
    NISSA = "nissa"


@app.command()
def tail(
    stream: StreamName,
    output: Output = Format.TABLE,
    last: Annotated[int, typer.Option("--last", min=0, max=1000, help="Begin with so many old ones.")] = 10,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on as messages come.")] = True,
    run: RunUid = None,
    public_key: PublicKey = None,
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
    """Follow a stream, decoded. JSON is one line per message.

    A message proves nothing by being there: SIGNATURE (-o wide) says `valid` only where --public-key has its key.
    """
    from esper_runtime.cli.buslink import Reach

    reach = Reach(
        url=url, username=username, password_file=password_file, ca=ca, namespace=namespace, context=context,
        kubeconfig=kubeconfig, state=state, local=local,
    )  # fmt: skip
    verifier, found = _verifier(public_key), _stream(stream)
    _with(reach, lambda oona: _tail(oona, found, output, last=last, follow=follow, run=run, verifier=verifier))


@app.command()
def peek(
    stream: Annotated[
        str | None, typer.Argument(metavar="STREAM", help="One stream with its newest messages; by default all.")
    ] = None,
    output: Output = Format.TABLE,
    count: Annotated[int, typer.Option("--count", min=1, max=1000, help="Messages to show.")] = 10,
    public_key: PublicKey = None,
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
    """Show streams: length, age of the newest message, groups with what they have still to do.

    PENDING is taken and not acknowledged, LAG not taken yet.
    """
    from esper_runtime.cli.buslink import Reach

    reach = Reach(
        url=url, username=username, password_file=password_file, ca=ca, namespace=namespace, context=context,
        kubeconfig=kubeconfig, state=state, local=local,
    )  # fmt: skip
    verifier = _verifier(public_key)
    one = None if stream is None else _stream(stream)
    if one is None:
        _with(reach, lambda oona: _overview(oona, output))
    else:
        _with(reach, lambda oona: _peek(oona, one, output, count=count, verifier=verifier))


@app.command("dead-letter")
def dead_letter(
    letter: Annotated[str | None, typer.Argument(metavar="ID", help="One letter, whole; by default all.")] = None,
    output: Output = Format.TABLE,
    reason: Annotated[str | None, typer.Option(help="Only those given up for this reason, such as INVALID.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=10_000, help="Letters to show, oldest first.")] = 100,
    public_key: PublicKey = None,
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
    """List messages that no consumer could handle, with the reason."""
    from esper_runtime.cli.buslink import Reach

    reach = Reach(
        url=url, username=username, password_file=password_file, ca=ca, namespace=namespace, context=context,
        kubeconfig=kubeconfig, state=state, local=local,
    )  # fmt: skip
    verifier, wanted = _verifier(public_key), _reason(reason)
    if letter is None:
        _with(reach, lambda oona: _letters(oona, output, wanted, count))
    else:
        _with(reach, lambda oona: _letter(oona, letter, output, verifier))


@app.command()
def replay(
    letters: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Letters to send back.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All letters, or all of --reason.")] = False,
    reason: Annotated[str | None, typer.Option(help="With --all: only those given up for this reason.")] = None,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
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
    """Send dead letters back to their streams, and remove them.

    Every group of the stream sees the message again, as a new one. Prints old and new ids. Exit code 1 when a letter
    could not go back; the others have gone.
    """
    from esper_runtime.cli.buslink import Reach

    if bool(letters) == everything:
        raise typer.BadParameter("give ids, or --all")
    if reason is not None and not everything:
        raise typer.BadParameter("--reason belongs to --all")
    reach = Reach(
        url=url, username=username, password_file=password_file, ca=ca, namespace=namespace, context=context,
        kubeconfig=kubeconfig, state=state, local=local,
    )  # fmt: skip
    wanted = _reason(reason)
    if _with(reach, lambda oona: _replay(oona, letters or [], everything=everything, reason=wanted, yes=yes)):
        raise typer.Exit(CliExit.ERROR)


@app.command()
def acl(
    users: Annotated[
        bool, typer.Option("--users/--no-users", help="With the right to make a user for each run.")
    ] = True,
    role: Annotated[Whose, typer.Option(help="Whose user: the operator's, or that of `esper nissa export`.")] = (
        Whose.OPERATOR
    ),
) -> None:
    """Print what a Redis user needs, as arguments of ACL SETUSER."""
    from esper_leyline.oona.acl import nissa_rules, operator_rules

    typer.echo(" ".join(operator_rules(users=users) if role is Whose.OPERATOR else nissa_rules()))


# Arguments


def _stream(name: str) -> "Stream":
    from esper_leyline.oona import STREAMS

    from esper_runtime.cli.busview import stream_of

    found = stream_of(name)
    if found is None:
        raise typer.BadParameter(f"no stream {name!r}: there are {', '.join(STREAMS)} and oona.signals.<run uid>")
    return found


def _verifier(path: Path | None) -> "Verifier | None":
    from esper_leyline.signing import Verifier

    if path is None:
        return None
    try:
        return Verifier.from_text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--public-key {path}: {error}") from error


def _reason(name: str | None) -> str | None:
    from esper_runtime.cli.busview import REASONS

    if name is None:
        return None
    found = name.upper().replace("-", "_")
    if found not in REASONS:
        raise typer.BadParameter(f"--reason {name}: one of {', '.join(REASONS)}")
    return found


# What the commands do


def _with(reach: "Reach", work: "Callable[[Oona], Awaitable[T]]") -> T:
    """Runs `work` with a client; what Redis refuses is one message."""
    from esper_leyline.oona import Oona, OonaUnavailable

    from esper_runtime.cli.buslink import reached

    async def main(config: Any) -> T:
        async with Oona(config) as oona:
            return await work(oona)

    with reached(reach) as config:
        try:
            return asyncio.run(main(config))
        except OonaUnavailable as error:
            raise BackendError(f"Redis: {error}: is it up, and may this user do that?") from error


async def _tail(
    oona: "Oona",
    stream: "Stream",
    form: Format,
    *,
    last: int,
    follow: bool,
    run: str | None,
    verifier: "Verifier | None",
) -> None:
    from esper_runtime.cli import busview

    whole = form in (Format.JSON, Format.YAML)
    async with oona.connection() as client:
        old = await busview.newest(oona, client, stream, max(last, 1))
        ahead_ms = await busview.now_ms(oona, client) - _wall_ms()
    position, shown = old[-1].id if old else "0-0", old[len(old) - last :] if last < len(old) else old
    if heading := busview.heading(form):
        typer.echo(heading)

    async def entries() -> AsyncIterator[Any]:
        for entry in shown:
            yield entry
        if follow:
            async with contextlib.aclosing(oona.entries(stream, position)) as coming:
                async for entry in coming:
                    yield entry

    async for entry in entries():
        row = busview.message(entry, _wall_ms() + ahead_ms, verifier, whole=whole)
        if run in (None, row.get("runUid")):
            typer.echo(busview.line(row, form))


def _wall_ms() -> int:
    import time

    return time.time_ns() // 1_000_000


async def _overview(oona: "Oona", form: Format) -> None:
    from esper_leyline.oona import STREAMS

    from esper_runtime.cli import busview

    async with oona.connection() as client:
        now = await busview.now_ms(oona, client)
        rows = [await busview.state(oona, client, stream, now) for stream in STREAMS.values()]
    typer.echo(busview.streams(rows, form))


async def _peek(oona: "Oona", stream: "Stream", form: Format, *, count: int, verifier: "Verifier | None") -> None:
    from esper_runtime.cli import busview

    whole = form in (Format.JSON, Format.YAML)
    async with oona.connection() as client:
        now = await busview.now_ms(oona, client)
        rows = [
            busview.message(e, now, verifier, whole=whole) for e in await busview.newest(oona, client, stream, count)
        ]
        found = await busview.state(oona, client, stream, now)
    if whole:
        typer.echo(document({**found, "messages": rows}, form))
        return
    if form is Format.NAME:
        typer.echo(busview.messages(rows, form))
        return
    blocks = [busview.streams([found], form), busview.consumers(found), busview.messages(rows, form) if rows else ""]
    typer.echo("\n\n".join(filter(None, blocks)))


async def _all_letters(oona: "Oona", reason: str | None, count: int | None) -> "list[Kept]":
    from esper_leyline.oona import dead_letters

    from esper_runtime.cli import busview

    found: list[Kept] = []
    position = "-"
    while page := await dead_letters(oona, after_id=position, count=_PAGE):
        position = page[-1].id
        found += [kept for kept in page if reason in (None, busview.letter(kept)["reason"])]
        if count is not None and len(found) >= count:
            return found[:count]
    return found


async def _letters(oona: "Oona", form: Format, reason: str | None, count: int) -> None:
    from esper_runtime.cli import busview

    rows = [busview.letter(kept) for kept in await _all_letters(oona, reason, count)]
    if not rows and form in (Format.TABLE, Format.WIDE):
        say("no dead letters")
        return
    text = busview.letters(rows, form)
    if text:
        typer.echo(text)


async def _letter(oona: "Oona", wanted: str, form: Format, verifier: "Verifier | None") -> None:
    from esper_leyline.oona import dead_letter as read

    from esper_runtime.cli import busview

    found = await read(oona, wanted)
    if found is None:
        raise BackendError(f"there is no dead letter {wanted}: `esper bus dead-letter` lists them")
    if form is Format.NAME:
        typer.echo(wanted)
        return
    row = busview.letter(found, verifier, whole=True)
    typer.echo(document(row, Format.JSON if form is Format.JSON else Format.YAML))


async def _replay(oona: "Oona", letters: list[str], *, everything: bool, reason: str | None, yes: bool) -> int:
    """Number of letters that could not go back."""
    from esper_leyline.oona import ReplayError
    from esper_leyline.oona import replay as send_back

    ids = [kept.id for kept in await _all_letters(oona, reason, None)] if everything else letters
    if not ids:
        say("no dead letters")
        return 0
    if not yes:
        if not sys.stdin.isatty():
            raise BackendError(f"nobody can be asked whether to send {len(ids)} dead letters back: say -y")
        typer.confirm(f"Send {len(ids)} dead letters back to their streams?", abort=True, err=True)
    failed = 0
    for one in ids:
        try:
            sent = await send_back(oona, [one])
        except ReplayError as error:
            say(f"error: {error}")
            failed += 1
        else:
            typer.echo(f"{one} {sent[one]}")
    return failed
