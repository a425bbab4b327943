"""Volumes of a pod as directories, and where its containers find them.

Nothing can be mounted on a laptop. Volumes lie where the layout says; a mount path that cannot exist here (/data, or
one that several containers use for different volumes) is replaced by the volume's directory wherever it begins a
value of the environment, an argument, or a text in runtime.config.
"""

import base64
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from esper_runtime.local.errors import LocalError

Manifest = Mapping[str, Any]
_DATA = "..data"


def project(directory: Path, files: Mapping[str, bytes], *, mode: int) -> bool:
    """Makes `directory` show exactly `files`, all at once, the way the kubelet does it. False when it did already.

    The files are links through `..data` to a directory of their generation; a reader or an inotify watch sees the
    old set or the new one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if _shown(directory) == dict(files):
        return False
    fresh = Path(tempfile.mkdtemp(prefix="..", dir=directory))
    fresh.chmod(0o700 if mode == 0o600 else 0o755)
    for name, content in files.items():
        target = fresh / name
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    data = directory / _DATA
    old = data.resolve() if data.is_symlink() else None
    _link(directory, _DATA, fresh.name)
    for name in files:
        if not (directory / name).is_symlink():
            _link(directory, name, f"{_DATA}/{name}")
    for entry in directory.iterdir():
        if not entry.name.startswith("..") and entry.name not in files:
            entry.unlink()
    if old is not None:
        shutil.rmtree(old)
    return True


def _shown(directory: Path) -> dict[str, bytes] | None:
    data = directory / _DATA
    if not data.is_dir():
        return None
    return {entry.name: entry.read_bytes() for entry in data.iterdir()}


def _link(directory: Path, name: str, target: str) -> None:
    temporary = directory / f"..{name}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(directory / name)


def object_files(manifest: Manifest) -> dict[str, bytes]:
    """The files that a ConfigMap or Secret shows when it is mounted."""
    secret = manifest["kind"] == "Secret"
    encoded = manifest.get("data" if secret else "binaryData") or {}
    plain = manifest.get("stringData" if secret else "data") or {}
    files = {key: base64.b64decode(value) for key, value in encoded.items()}
    return files | {key: value.encode() for key, value in plain.items()}


def select(files: Mapping[str, bytes], items: Iterable[Mapping[str, Any]] | None) -> dict[str, bytes]:
    """`files` as a volume with `items` shows them; KeyError names a key that is not there."""
    if not items:
        return dict(files)
    return {item["path"]: files[item["key"]] for item in items}


@dataclass(frozen=True, slots=True)
class Mount:
    """One volumeMount of one container."""

    path: str
    """As the manifest says it."""
    directory: Path
    """Where it really is."""


@dataclass(frozen=True, slots=True)
class Mounts:
    """All mounts of one container, and file replacements such as its termination log."""

    entries: tuple[Mount, ...]

    def translate(self, text: str) -> str:
        """`text` with a leading mount path replaced by the real directory; other texts as they are."""
        best: Mount | None = None
        for mount in self.entries:
            covers = text == mount.path or text.startswith(mount.path.rstrip("/") + "/")
            if covers and (best is None or len(mount.path) > len(best.path)):
                best = mount
        if best is None:
            return text
        return str(best.directory) + text[len(best.path.rstrip("/")) :]

    def translate_all(self, value: Any) -> Any:
        """The same for every text inside a JSON value."""
        if isinstance(value, str):
            return self.translate(value)
        if isinstance(value, Mapping):
            return {key: self.translate_all(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.translate_all(item) for item in value]
        return value


def mount_directories(pod_spec: Manifest, roots: Iterable[str], scratch: Path) -> dict[str, Path]:
    """Where each volume of the pod lies: at its mount path when that is below one of `roots` and no other volume is
    mounted there, else below `scratch`."""
    paths: dict[str, set[str]] = {}
    users: dict[str, set[str]] = {}
    for container in (*pod_spec.get("initContainers", ()), *pod_spec["containers"]):
        for mount in container.get("volumeMounts", ()):
            if not mount.get("subPath"):
                paths.setdefault(mount["name"], set()).add(mount["mountPath"])
                users.setdefault(mount["mountPath"], set()).add(mount["name"])
    allowed = tuple(PurePosixPath(root) for root in roots)
    found: dict[str, Path] = {}
    for volume in pod_spec.get("volumes", ()):
        name = volume["name"]
        at = paths.get(name, set())
        path = next(iter(at)) if len(at) == 1 else ""
        own = path and users[path] == {name} and any(PurePosixPath(path).is_relative_to(root) for root in allowed)
        found[name] = Path(path) if own else scratch / name
    return found


def container_mounts(container: Manifest, directories: Mapping[str, Path]) -> list[Mount]:
    """The mounts of one container; LocalError for a subPath that leads out of its volume."""
    mounts: list[Mount] = []
    for mount in container.get("volumeMounts", ()):
        directory = directories[mount["name"]]
        sub_path = mount.get("subPath", "")
        if sub_path:
            if ".." in PurePosixPath(sub_path).parts or sub_path.startswith("/"):
                raise LocalError(f"volume {mount['name']}: subPath {sub_path!r} leads out of the volume")
            directory = directory / sub_path
        mounts.append(Mount(mount["mountPath"], directory))
    return mounts


_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][-A-Za-z0-9_.]*)\)")


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Kubernetes' own $(NAME) in values and arguments: unknown names stay as they are, $$ is one $."""

    def value(match: re.Match[str]) -> str:
        if match.group() == "$$":
            return "$"
        return variables.get(match.group(1), match.group())

    return _REFERENCE.sub(value, text)
