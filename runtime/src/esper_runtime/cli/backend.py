"""What the commands need of a place where runs live, and how the place is chosen."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Resource = dict[str, Any]


class BackendError(Exception):
    """A message for the user; exit code 1."""


class NotFound(BackendError):
    """No run of that name."""


class NoCluster(BackendError):
    """No kubeconfig that could be used."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where to look, from the options of a command."""

    namespace: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None
    state: Path | None = None
    local: bool | None = None
    """True: this machine; False: the cluster; None: this machine when the run is there, else the cluster."""


class Backend(Protocol):
    """Runs on a cluster or on this machine. Everything raises BackendError with a message for the user."""

    @property
    def is_local(self) -> bool: ...

    @property
    def namespace(self) -> str:
        """Of the runs that are meant when nothing else is said."""
        ...

    def runs(self, *, all_namespaces: bool, selector: str = "") -> list[Resource]:
        """Those with these labels, as kubectl -l takes them; ValueError for a selector that is none."""
        ...

    def get(self, name: str) -> Resource: ...

    def watch(self, name: str) -> Iterator[Resource]:
        """The run now, after every change, and once a second in between. Ends when the run is deleted."""
        ...

    def patch_spec(self, name: str, changes: dict[str, Any]) -> Resource:
        """Sets fields of the spec."""
        ...

    def logs(self, name: str, *, container: str, follow: bool, tail: int | None) -> Iterator[bytes]:
        """Pieces of the log of a container of the newest pod."""
        ...

    def fetch(self, name: str, destination: Path, *, image: str | None) -> list[Path]:
        """Brings the exported model home, verified; the files written."""
        ...


def choose(place: Place, name: str | None = None) -> Backend:
    """The backend for a command about `name`, or about all runs when that is None."""
    from esper_runtime.cli.local_backend import LocalBackend

    if place.local is True or place.state is not None:
        if place.local is False:
            raise BackendError("--state belongs to runs on this machine: leave out --cluster")
        return LocalBackend(namespace=place.namespace, state=place.state)
    if place.local is None and not place.context and not place.kubeconfig:
        here = LocalBackend(namespace=place.namespace)
        if here.has(name):
            return here
    from esper_runtime.cli.cluster_backend import ClusterBackend

    try:
        return ClusterBackend.connect(namespace=place.namespace, context=place.context, kubeconfig=place.kubeconfig)
    except NoCluster as error:
        problem = " ".join(str(error).split()).rstrip(".")
        if place.local is False or place.context or place.kubeconfig:
            raise BackendError(f"no cluster: {problem}: give --kubeconfig, or set KUBECONFIG") from None
        missing = "no runs" if name is None else f"no run {name!r}"
        raise BackendError(
            f"{missing} below .esper on this machine, and no cluster to ask ({problem}): start one with "
            "`esper run MANIFEST`, or say where to look with --state or --kubeconfig"
        ) from None
