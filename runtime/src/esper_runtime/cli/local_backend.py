"""Runs on this machine: state directories below .esper, or one given by --state."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esper_leyline import paths
from esper_operator.observe.selector import matches

from esper_runtime.cli.backend import BackendError, NotFound, Resource
from esper_runtime.cli.export import copy_verified
from esper_runtime.cli.output import find
from esper_runtime.local.errors import LocalError
from esper_runtime.local.objects import Objects
from esper_runtime.local.state import DEFAULT_ROOT, StateDir, find_runs

POLL_S = 0.1
REPEAT_S = 1.0
_CHUNK = 65536


class LocalBackend:
    """Reads what `esper run` keeps; changes specs under its lock."""

    is_local = True

    def __init__(self, *, namespace: str | None = None, state: Path | None = None, root: Path = DEFAULT_ROOT) -> None:
        self._namespace = namespace
        self._state = None if state is None else StateDir(state)
        self._root = root

    @property
    def namespace(self) -> str:
        return self._namespace or "default"

    @property
    def options(self) -> str:
        """What the next command about the same run has to be given."""
        return "" if self._state is None else f" --state {self._state.root}"

    def has(self, name: str | None) -> bool:
        """Whether a run of that name, or any run, is here."""
        return any(name in (None, found.root.name) for found in self._all())

    def runs(self, *, all_namespaces: bool, selector: str = "") -> list[Resource]:
        runs = (self._read(found) for found in self._all(all_namespaces))
        return [run for run in runs if not selector or matches(selector, find(run, "metadata", "labels") or {})]

    def get(self, name: str) -> Resource:
        return self._read(self.find(name))

    def watch(self, name: str) -> Iterator[Resource]:
        state = self.find(name)
        seen, told_at = 0, 0.0
        while True:
            now = state.modified_ns()
            if now == 0:
                return
            if now != seen or time.monotonic() - told_at >= REPEAT_S:
                seen, told_at = now, time.monotonic()
                yield self._read(state)
            else:
                time.sleep(POLL_S)

    def patch_spec(self, name: str, changes: dict[str, Any]) -> Resource:
        try:
            return self.find(name).change_spec(lambda spec: spec.update(changes))
        except LocalError as error:
            raise BackendError(str(error)) from error

    def logs(self, name: str, *, container: str, follow: bool, tail: int | None) -> Iterator[bytes]:
        state = self.find(name)
        path = newest_log(state, container)
        while path is None:
            if not follow or state.runner_pid() is None:
                raise BackendError(f"{name}: container {container} has no log yet{_others(state)}")
            time.sleep(POLL_S)
            path = newest_log(state, container)
        with path.open("rb") as file:
            if tail is not None:
                file.seek(tail_offset(path, tail))
            while True:
                if chunk := file.read(_CHUNK):
                    yield chunk
                elif not follow or state.runner_pid() is None:
                    return
                else:
                    newest = newest_log(state, container)
                    if newest is not None and newest != path:
                        yield from self.logs(name, container=container, follow=True, tail=None)
                        return
                    time.sleep(POLL_S)

    def fetch(self, name: str, destination: Path, *, image: str | None) -> list[Path]:
        state = self.find(name)
        return copy_verified(export_directory(state, self._read(state)), destination)

    def find(self, name: str) -> StateDir:
        """The state of a run by name. NotFound says where was looked."""
        if self._state is not None:
            if self._read(self._state)["metadata"]["name"] != name:
                raise NotFound(f"{self._state.root}: the run there is not {name!r}")
            return self._state
        found = [state for state in self._all() if state.root.name == name]
        if len(found) > 1:
            places = ", ".join(state.root.parent.name for state in found)
            raise BackendError(f"{name}: runs of this name are in the namespaces {places}: choose one with --namespace")
        if not found:
            raise NotFound(f"{name}: no such run below {self._root}/{self._namespace or '*'}")
        return found[0]

    def _all(self, all_namespaces: bool = False) -> list[StateDir]:
        if self._state is not None:
            return [self._state] if self._state.exists() else []
        wanted = None if all_namespaces else self._namespace
        return [state for state in find_runs(self._root) if wanted in (None, state.root.parent.name)]

    def _read(self, state: StateDir) -> Resource:
        try:
            return state.read()
        except LocalError as error:
            raise NotFound(str(error)) from error


def export_directory(state: StateDir, resource: Resource) -> Path:
    """Where the exported model of a run is, once there is one."""
    storage = resource["spec"]["checkpoint"]["storage"]
    claim = storage.get("claimName")
    root = state.checkpoints if claim is None else Objects(state).claim(claim, own="")
    return root / str(storage.get("subPath", "")) / str(resource["metadata"]["uid"]) / paths.EXPORT_DIR


def newest_log(state: StateDir, container: str) -> Path | None:
    """The container's log in its newest pod."""
    found = list(state.logs.glob(f"*/{container}.log"))
    return max(found, key=lambda path: path.parent.stat().st_ctime_ns, default=None)


def tail_offset(path: Path, lines: int) -> int:
    """Where the last `lines` lines begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        found, at = 0, size
        while at > 0:
            start = max(0, at - _CHUNK)
            file.seek(start)
            chunk = file.read(at - start)
            for index in range(len(chunk) - 1, -1, -1):
                if chunk[index] == 0x0A and start + index != size - 1:
                    found += 1
                    if found == lines:
                        return start + index + 1
            at = start
    return 0 if lines > 0 else size


def _others(state: StateDir) -> str:
    names = sorted({path.stem for path in state.logs.glob("*/*.log")})
    return f"; there are logs of {', '.join(names)}" if names else ""
