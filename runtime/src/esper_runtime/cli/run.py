"""`esper run` and `esper validate`: manifest in, live view on standard error, exit code out."""

import asyncio
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from esper_leyline.exitcodes import CliExit
from esper_leyline.phases import ConditionType, EmergencyStop, Phase

from esper_runtime.cli.export import opened_first
from esper_runtime.cli.live import View, view
from esper_runtime.cli.local_backend import export_directory
from esper_runtime.cli.output import Format, Resource, describe, find, say, show, width_of
from esper_runtime.local.manifest import load
from esper_runtime.local.prepare import Prepared, checked, prepare, prepare_stored
from esper_runtime.local.state import StateDir

NOT_ISOLATED = (
    "note: the processes of a run are not isolated from each other here, and share one Redis without users; on a "
    "cluster they are containers, and each run has a user of its own"
)
IMAGE_UNUSED = "note: spec.runtime.image is not used on this machine; the installed packages are"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """The options of `esper run`."""

    manifest: str
    namespace: str | None
    state: Path | None
    mounts: dict[str, Path]
    fresh: bool
    redis: bool
    stay_halted: bool
    output: Format | None


def validate_manifest(manifest: str, namespace: str | None) -> int:
    """0 when it could run; ManifestError says what is wrong."""
    run = load(manifest, namespace=namespace).run
    checked(run)
    say(f"{run['metadata']['namespace']}/{run['metadata']['name']}: valid")
    return CliExit.SUCCEEDED


def run_manifest(request: RunRequest) -> int:
    """Runs the manifest to its end; the exit code."""
    documents = load(request.manifest, namespace=request.namespace)
    metadata = documents.run["metadata"]
    checked(documents.run)
    state = StateDir.of(metadata["namespace"], metadata["name"]) if request.state is None else StateDir(request.state)
    state.create()
    with state.runner_lock():
        prepared = prepare(state, documents, request.mounts, fresh=request.fresh)
        return _run(
            state,
            prepared,
            options="" if request.state is None else f" --state {request.state}",
            redis=request.redis,
            stay_halted=request.stay_halted,
            output=request.output,
        )


def run_stored(state: StateDir, *, options: str = "") -> int:
    """Goes on with a run as it is stored. `options` are what other commands need to find it."""
    with state.runner_lock():
        return _run(state, prepare_stored(state), options=options, redis=True, stay_halted=False, output=None)


def _run(
    state: StateDir, prepared: Prepared, *, options: str, redis: bool, stay_halted: bool, output: Format | None
) -> int:
    name = prepared.resource["metadata"]["name"]
    if prepared.finished is not None:
        phase = find(prepared.resource, "status", "phase")
        say(f"{name}: this run has {phase} already; `esper run --fresh` starts anew")
        code = prepared.finished
    else:
        _announce(state, prepared)
        with view(sys.stderr, known=find(prepared.resource, "status", "history") or ()) as shown:
            hints = Hints(shown.note, f"esper resume {name}{options}")
            code = _drive(state, prepared, shown, hints, redis=redis, stay_halted=stay_halted)
        _conclude(state, code, options)
    if output is not None:
        print(show([state.read()], output, single=True), flush=True)
    return code


def _announce(state: StateDir, prepared: Prepared) -> None:
    name = prepared.resource["metadata"]["name"]
    say(f"{name}: {_beginning(prepared)}; state: {nearby(state.root)}")
    say("Ctrl-C saves and stops; the same command again goes on from there")
    say(NOT_ISOLATED)
    if find(prepared.resource, "spec", "runtime", "image"):
        say(IMAGE_UNUSED)


def _beginning(prepared: Prepared) -> str:
    """The step only when it is known for certain: after a kill the volume may hold a newer one than the status."""
    if not prepared.resumed:
        return "starting"
    status = prepared.resource.get("status") or {}
    step = find(status, "checkpoint", "latestVerifiedStep")
    at_rest = status.get("phase") in (Phase.HALTED, Phase.SUSPENDED)
    return f"resuming from step {step}" if at_rest and step is not None else "resuming"


class Hints:
    """Tells who waits at this terminal how a run goes on that somebody has stopped, and that keeps this command."""

    def __init__(self, say: Callable[[str], None], resume: str) -> None:
        """`resume` is the command."""
        self._say = say
        self._resume = resume
        self._phase: str | None = None

    def update(self, resource: Resource) -> None:
        before, self._phase = self._phase, find(resource, "status", "phase")
        spec = resource["spec"]
        suspended = self._phase == Phase.SUSPENDED and spec.get("suspend")  # and not by Ctrl-C here
        frozen = self._phase == Phase.HALTED and spec.get("emergencyStop") == EmergencyStop.FREEZE
        if self._phase != before and (suspended or frozen):
            self._say(f"{self._phase}: `{self._resume}` in another terminal goes on, Ctrl-C ends this command")


def _drive(
    state: StateDir, prepared: Prepared, shown: View, hints: Hints, *, redis: bool, stay_halted: bool
) -> CliExit:
    # Imported here: it brings the operator's core, aiohttp and the event loop's machinery.
    from esper_runtime.local.session import STOP_SIGNALS, Options, drive

    def changed(resource: Resource) -> None:
        shown.update(resource)
        hints.update(resource)

    options = Options(redis=redis, stay_halted=stay_halted, say=shown.note, on_change=changed)
    code = asyncio.run(drive(state, prepared, options))
    for number in STOP_SIGNALS:  # it has stopped; what is left is to say how it ended
        signal.signal(number, signal.SIG_IGN)
    return code


_NEXT: dict[CliExit, Callable[[str], str]] = {
    CliExit.SUCCEEDED: lambda name: f"`esper fetch {name} DIR` copies it, its digest checked",
    CliExit.HALTED: lambda name: f"`esper resume {name}` goes on",
    CliExit.FAILED: lambda name: f"see `esper logs {name}`; `esper run --fresh` starts anew",
    CliExit.INTERRUPTED: lambda name: f"stopped by hand; the same command again, or `esper resume {name}`, goes on",
}


def _conclude(state: StateDir, code: CliExit, options: str) -> None:
    """How it ended: the status, without conditions when all is well, and what to do next."""
    resource = state.read()
    say("")
    say(describe(resource, conditions=code is CliExit.FAILED, width=width_of(sys.stderr)))
    say("")
    name, phase = resource["metadata"]["name"], find(resource, "status", "phase")
    if code is CliExit.SUCCEEDED:
        complete = next(c for c in resource["status"]["conditions"] if c["type"] == ConditionType.COMPLETE)
        say(complete["message"])
        say(f"model: {nearby(opened_first(export_directory(state, resource)))}")
    say(f"{name}: {phase}; {_NEXT[code](name + options)}")


def nearby(path: Path) -> Path:
    """Relative where it is below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
