"""`esper run` and `esper validate`: manifest in, live view on standard error, exit code out."""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from esper_leyline.exitcodes import CliExit

from esper_runtime.cli.live import View, view
from esper_runtime.cli.output import Format, describe, find, say, show
from esper_runtime.local.manifest import load
from esper_runtime.local.prepare import Prepared, checked, prepare, prepare_stored
from esper_runtime.local.state import StateDir

NOT_ISOLATED = "note: here the parts of a run are not isolated from each other, as containers on a cluster are"
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
        return _run(state, prepared, redis=request.redis, stay_halted=request.stay_halted, output=request.output)


def run_stored(state: StateDir) -> int:
    """Goes on with a run as it is stored."""
    with state.runner_lock():
        return _run(state, prepare_stored(state), redis=True, stay_halted=False, output=None)


def _run(state: StateDir, prepared: Prepared, *, redis: bool, stay_halted: bool, output: Format | None) -> int:
    name = prepared.resource["metadata"]["name"]
    if prepared.finished is not None:
        phase = find(prepared.resource, "status", "phase")
        say(f"{name}: this run has {phase} already; `esper run --fresh` starts anew")
        code = prepared.finished
    else:
        _announce(state, prepared)
        with view(sys.stderr) as shown:
            code = _drive(state, prepared, shown, redis=redis, stay_halted=stay_halted)
        _conclude(state, code)
    if output is not None:
        print(show([state.read()], output, single=True), flush=True)
    return code


def _announce(state: StateDir, prepared: Prepared) -> None:
    say(f"state: {state.root}")
    say(NOT_ISOLATED)
    if find(prepared.resource, "spec", "runtime", "image"):
        say(IMAGE_UNUSED)
    if prepared.resumed:
        saved = find(prepared.resource, "status", "checkpoint", "latestVerifiedStep")
        say(f"resuming {prepared.resource['metadata']['name']}" + (f" from step {saved}" if saved is not None else ""))


def _drive(state: StateDir, prepared: Prepared, shown: View, *, redis: bool, stay_halted: bool) -> CliExit:
    # Imported here: it brings the operator's core, aiohttp and the event loop's machinery.
    from esper_runtime.local.session import Options, drive

    options = Options(redis=redis, stay_halted=stay_halted, say=shown.note, on_change=shown.update)
    return asyncio.run(drive(state, prepared, options))


_NEXT: dict[CliExit, Callable[[str], str]] = {
    CliExit.SUCCEEDED: lambda name: f"`esper fetch {name} DIR` brings the model home",
    CliExit.HALTED: lambda name: f"`esper resume {name}` goes on",
    CliExit.FAILED: lambda name: f"see `esper status {name}` and `esper logs {name}`",
    CliExit.INTERRUPTED: lambda name: f"stopped by hand; the same command again, or `esper resume {name}`, goes on",
}


def _conclude(state: StateDir, code: CliExit) -> None:
    resource = state.read()
    say("")
    say(describe(resource))
    say("")
    name = resource["metadata"]["name"]
    say(f"{name}: {find(resource, 'status', 'phase')}; {_NEXT[code](name)}")
