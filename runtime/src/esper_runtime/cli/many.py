"""`esper halt` and `esper resume` for many runs at once: by labels, or all of a namespace.

On a cluster the stop is one key of ConfigMap esper-emergency in the operator's namespace, so that it also holds for
runs that are created later, until the key is removed. On this machine, where nobody reads such a map, each run that
matches is stopped by its own spec.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import yaml
from esper_leyline.labels import EMERGENCY_CONFIG_MAP
from esper_leyline.phases import Phase
from esper_operator.observe.selector import matches
from kubernetes import client

from esper_runtime.cli.backend import Backend, BackendError, Resource
from esper_runtime.cli.cluster_backend import MERGE_PATCH, ClusterBackend
from esper_runtime.cli.output import find, say

_FINISHED = frozenset({Phase.SUCCEEDED, Phase.FAILED})
NO_PLACE_FOR_REASON = "--reason is not kept: only a broadcast on a cluster has a place for it"
_LOOK_S = 0.5
_REST = 4
"""Times as long as a look took: looking must not be what keeps the API server busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which runs, and what of them."""

    selector: str
    """As kubectl -l takes it; empty: all."""
    namespaces: tuple[str, ...]
    """Empty: all."""
    mode: str
    reason: str = ""

    def selects(self, run: Resource) -> bool:
        labels = {str(key): str(value) for key, value in (find(run, "metadata", "labels") or {}).items()}
        inside = not self.namespaces or find(run, "metadata", "namespace") in self.namespaces
        return inside and (not self.selector or matches(self.selector, labels))

    @property
    def id(self) -> str:
        """The same for the same wish, so that saying it twice is saying it once."""
        text = json.dumps([self.selector, self.namespaces, self.mode])
        return f"cli-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def document(self) -> str:
        """Value of its key in the ConfigMap."""
        document: dict[str, object] = {"mode": self.mode, "selector": self.selector or {}}
        if self.namespaces:
            document["namespaces"] = list(self.namespaces)
        if self.reason:
            document["reason"] = self.reason
        return yaml.safe_dump(document, sort_keys=False)


def halt_many(
    backend: Backend, wanted: Wanted, *, operator_namespace: str, dry_run: bool, wait_s: float, all_namespaces: bool
) -> None:
    """Says which runs stop, and how long it took them. BackendError when some have not by the deadline."""
    _require_selector(wanted)
    runs = _selected(backend, wanted, all_namespaces)
    for run in runs:
        say(f"{'would stop' if dry_run else 'stops'}: {_name(run)} ({find(run, 'status', 'phase') or 'Pending'})")
    cluster = isinstance(backend, ClusterBackend)
    if dry_run:
        later = "; runs created later would start halted while it holds" if cluster else ""
        say(f"{len(runs)} of the runs that there are now{later}")
        return
    if not cluster and not runs:
        raise BackendError("nothing was stopped: no run here matches, or all have ended; see `esper list`")
    began = time.monotonic()
    if isinstance(backend, ClusterBackend):
        _write(backend, operator_namespace, {wanted.id: wanted.document()})
        say(f"broadcast {wanted.id}: {wanted.mode}; `esper resume --broadcast {wanted.id}` lifts it")
        if not runs:
            say("it stops no run that there is now, only runs that are created while it holds")
    else:
        say(f"`esper resume NAME` lets {'it' if len(runs) == 1 else 'each'} go on")
        if wanted.reason:
            say(NO_PLACE_FOR_REASON)
        for run in runs:
            backend.patch_spec(find(run, "metadata", "name"), {"emergencyStop": wanted.mode})
    if wait_s > 0 and runs:
        _wait(backend, wanted, all_namespaces, began + wait_s, lambda run: _phase(run) == Phase.HALTED)
        say(f"{len(runs)} halted after {time.monotonic() - began:.1f} s")


def resume_broadcast(backend: Backend, broadcast: str, *, operator_namespace: str) -> None:
    """Removes a key of esper-emergency; each run goes on unless another stop holds it."""
    if not isinstance(backend, ClusterBackend):
        raise BackendError("there are no broadcasts on this machine: `esper resume NAME` for each run")
    if broadcast not in broadcasts(backend, operator_namespace):
        raise BackendError(
            f"there is no broadcast {broadcast!r} in ConfigMap {operator_namespace}/{EMERGENCY_CONFIG_MAP}: "
            f"`kubectl get configmap -n {operator_namespace} {EMERGENCY_CONFIG_MAP} -o yaml` shows those that hold"
        )
    _write(backend, operator_namespace, {broadcast: None})
    say(f"broadcast {broadcast} is lifted")


def broadcasts(backend: ClusterBackend, operator_namespace: str) -> dict[str, str]:
    """Those that hold, by id."""
    listed = backend.call(
        backend.core.list_namespaced_config_map,
        namespace=operator_namespace,
        field_selector=f"metadata.name={EMERGENCY_CONFIG_MAP}",
        _preload_content=False,
    )
    found = json.loads(listed.data)["items"]
    return dict(found[0].get("data") or {}) if found else {}


def _require_selector(wanted: Wanted) -> None:
    try:
        matches(wanted.selector or {}, {})
    except ValueError as error:
        raise BackendError(f"-l {wanted.selector}: {error}") from error


def _selected(backend: Backend, wanted: Wanted, all_namespaces: bool) -> list[Resource]:
    """Runs that the wish is about and that have not finished."""
    runs = backend.runs(all_namespaces=all_namespaces, selector=wanted.selector)
    return [run for run in runs if wanted.selects(run) and _phase(run) not in _FINISHED]


def _write(backend: ClusterBackend, namespace: str, keys: dict[str, str | None]) -> None:
    """Sets keys; None removes one."""
    exists = backend.call(
        backend.core.list_namespaced_config_map,
        namespace=namespace,
        field_selector=f"metadata.name={EMERGENCY_CONFIG_MAP}",
        _preload_content=False,
    )
    if json.loads(exists.data)["items"]:
        backend.call(
            backend.core.patch_namespaced_config_map,
            name=EMERGENCY_CONFIG_MAP,
            namespace=namespace,
            body={"data": keys},
            _content_type=MERGE_PATCH,
            what=EMERGENCY_CONFIG_MAP,
        )
        return
    metadata = client.V1ObjectMeta(name=EMERGENCY_CONFIG_MAP)
    body = client.V1ConfigMap(metadata=metadata, data={key: text for key, text in keys.items() if text is not None})
    backend.call(backend.core.create_namespaced_config_map, namespace=namespace, body=body, what=namespace)


def _wait(
    backend: Backend, wanted: Wanted, all_namespaces: bool, deadline: float, reached: Callable[[Resource], bool]
) -> None:
    while True:
        began = time.monotonic()
        missing = [run for run in _selected(backend, wanted, all_namespaces) if not reached(run)]
        if not missing:
            return
        if began > deadline:
            raise BackendError(f"not halted in time: {_names(missing)}; see `esper list`")
        time.sleep(max(_LOOK_S, _REST * (time.monotonic() - began)))


def _names(runs: Sequence[Resource]) -> str:
    more = f" and {len(runs) - 10} more" if len(runs) > 10 else ""
    return ", ".join(_name(run) for run in runs[:10]) + more


def _name(run: Resource) -> str:
    return f"{find(run, 'metadata', 'namespace')}/{find(run, 'metadata', 'name')}"


def _phase(run: Resource) -> str | None:
    found = find(run, "status", "phase")
    return None if found is None else str(found)
