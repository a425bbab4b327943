"""`esper halt`, `resume` and `suspend`: one change of the spec, and the wait until the run has followed."""

import time
from collections.abc import Callable, Iterator

from esper_leyline.exitcodes import CliExit
from esper_leyline.phases import EmergencyStop, Phase

from esper_runtime.cli.backend import Backend, BackendError, Resource
from esper_runtime.cli.output import find, say

_FINISHED = frozenset({Phase.SUCCEEDED, Phase.FAILED})


def halt_one(backend: Backend, name: str, mode: str, *, reason: str, dry_run: bool, wait_s: float) -> None:
    """A reason is no reason to stop nothing: it is only said that it has no place."""
    before = backend.get(name)
    _refuse_finished(before)
    if dry_run:
        say(f"would stop: {name} ({_phase(before) or 'Pending'})")
        return
    backend.patch_spec(name, {"emergencyStop": mode})
    if reason:
        from esper_runtime.cli.many import NO_PLACE_FOR_REASON

        say(NO_PLACE_FOR_REASON)
    if not _driven(backend, name):
        say(f"{name}: nothing drives this run now; it stays halted ({mode}) until `esper resume {name}`")
        return
    resource = _wait(backend, name, wait_s, lambda r: _halted(r, mode), f"halted ({mode})")
    if resource is not None:
        say(f"{name}: {halt_line(resource)}")


def halt_selected(
    backend: Backend,
    *,
    selector: str,
    all_namespaces: bool,
    mode: str,
    reason: str,
    operator_namespace: str,
    dry_run: bool,
    wait_s: float,
) -> None:
    """Runs by labels, or all of them."""
    from esper_runtime.cli.many import Wanted, halt_many

    namespaces = () if all_namespaces else (backend.namespace,)
    halt_many(
        backend,
        Wanted(selector=selector, namespaces=namespaces, mode=mode, reason=reason),
        operator_namespace=operator_namespace,
        dry_run=dry_run,
        wait_s=wait_s,
        all_namespaces=all_namespaces,
    )


def resume(backend: Backend, name: str, *, wait_s: float) -> int:
    """The exit code: that of the run when it goes on in this process."""
    _refuse_finished(backend.get(name))
    changes = {"emergencyStop": EmergencyStop.NONE.value, "suspend": False}
    backend.patch_spec(name, changes)
    resource = None
    if _driven(backend, name):
        # An `esper run` that ends because of the halt may still be there: look until it goes on or is gone.
        resource = _wait(backend, name, wait_s, lambda r: _running(r) or not _driven(backend, name), "running")
    if not _driven(backend, name):
        return _go_on_here(backend, name)
    if resource is not None:
        say(f"{name}: {find(resource, 'status', 'phase')} from step {find(resource, 'status', 'progress', 'step')}")
    return CliExit.SUCCEEDED


def _go_on_here(backend: Backend, name: str) -> int:
    from esper_runtime.cli.local_backend import LocalBackend
    from esper_runtime.cli.run import run_stored

    assert isinstance(backend, LocalBackend)
    return run_stored(backend.find(name), options=backend.options)


def suspend(backend: Backend, name: str, *, wait_s: float) -> None:
    _refuse_finished(backend.get(name))
    backend.patch_spec(name, {"suspend": True})
    if not _driven(backend, name):
        say(f"{name}: nothing drives this run now; it stays suspended until `esper resume {name}`")
        return
    if _wait(backend, name, wait_s, lambda r: _phase(r) == Phase.SUSPENDED, "suspended") is not None:
        say(f"{name}: suspended; `esper resume {name}` goes on")


def halt_line(resource: Resource) -> str:
    """What status.halt says, in one line."""
    found = find(resource, "status", "halt") or {}
    text = f"halted by {found.get('mode')}, {found.get('acknowledged', 0)}/{found.get('expected', 0)} acknowledged"
    if found.get("milliseconds") is not None:
        text += f" in {found['milliseconds']} ms"
    if found.get("savedStep") is not None:
        text += f", saved step {found['savedStep']}"
    return text


def _driven(backend: Backend, name: str) -> bool:
    """Whether somebody acts on the spec: the operator of a cluster, or an `esper run` of this machine."""
    from esper_runtime.cli.local_backend import LocalBackend

    return not isinstance(backend, LocalBackend) or backend.find(name).runner_pid() is not None


def _refuse_finished(resource: Resource) -> None:
    if (phase := _phase(resource)) in _FINISHED:
        raise BackendError(f"{find(resource, 'metadata', 'name')}: the run has {phase}; nothing is left to control")


def _wait(
    backend: Backend, name: str, wait_s: float, reached: Callable[[Resource], bool], what: str
) -> Resource | None:
    """The resource once it is `reached`; None when nobody waits. BackendError at the deadline or another end."""
    if wait_s <= 0:
        return None
    for resource in _until(backend.watch(name), time.monotonic() + wait_s):
        if reached(resource):
            return resource
        if _phase(resource) in _FINISHED:
            raise BackendError(f"{name}: the run has {_phase(resource)} before it was {what}")
    raise BackendError(f"{name}: not {what} within {wait_s:g} s; see `esper status {name}`")


def _until(resources: Iterator[Resource], deadline: float) -> Iterator[Resource]:
    for resource in resources:
        yield resource
        if time.monotonic() > deadline:
            return


def _phase(resource: Resource) -> str | None:
    found = find(resource, "status", "phase")
    return None if found is None else str(found)


def _halted(resource: Resource, mode: str) -> bool:
    return _phase(resource) == Phase.HALTED and find(resource, "status", "halt", "mode") == mode


def _running(resource: Resource) -> bool:
    return _phase(resource) in (Phase.RUNNING, Phase.SUCCEEDED)
