"""The ConfigMaps and Secrets of a run, and the directories that stand for what a cluster would hold.

Everything is kept in the state directory, so that `esper resume` works without the manifest.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from esper_runtime.local.errors import LocalError, ManifestError, StateError
from esper_runtime.local.manifest import Documents
from esper_runtime.local.state import StateDir, write_json
from esper_runtime.local.volumes import object_files

Manifest = dict[str, Any]
KINDS = ("ConfigMap", "Secret")


class Objects:
    """Objects by kind and name, stored as files of mode 0600, and the directories given by --mount."""

    def __init__(self, state: StateDir) -> None:
        self._directory = state.objects
        self._mounts_file = state.objects / "mounts.json"
        self._generated_claim = state.checkpoints
        self.mounts = self._read_mounts()

    def take(self, documents: Documents, mounts: Mapping[str, Path], reserved: Iterable[str]) -> None:
        """Stores what came with the manifest. `reserved` are names of the run's own objects."""
        own = set(reserved)
        for kind, sources in (("ConfigMap", documents.config_maps), ("Secret", documents.secrets)):
            for name, source in sources.items():
                if name in own:
                    raise ManifestError(f"{kind} {name}: the run itself makes an object of this name: choose another")
                write_json(
                    self._path(kind, name),
                    {"kind": kind, "metadata": {"name": name}, "files": _texts(source.files)},
                    mode=0o600,
                )
        self.mounts = {**self.mounts, **{name: path.absolute() for name, path in mounts.items()}}
        write_json(self._mounts_file, {name: str(path) for name, path in self.mounts.items()}, mode=0o600)

    def get(self, kind: str, name: str) -> Manifest | None:
        path = self._path(kind, name)
        try:
            found: Manifest = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StateError(f"{path}: cannot be read: {error}") from error
        return found

    def put(self, manifest: Manifest) -> Manifest:
        """Creates or replaces an object of the run; what is stored, with its next resourceVersion."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        known = self.get(kind, name)
        version = 0 if known is None else int(known["metadata"].get("resourceVersion", 0))
        stored = {**manifest, "metadata": {**manifest["metadata"], "resourceVersion": str(version + 1)}}
        write_json(self._path(kind, name), stored, mode=0o600)
        return stored

    def files(self, kind: str, name: str) -> dict[str, bytes] | None:
        """What a mounted ConfigMap or Secret shows; None when there is no such object."""
        mounted = self.mounts.get(name)
        found = self.get(kind, name)
        if found is None:
            return None if mounted is None else _directory_files(mounted)
        if "files" in found:
            return {key: bytes.fromhex(value) for key, value in found["files"].items()}
        return object_files(found)

    def claim(self, name: str, *, own: str) -> Path:
        """The directory of a PersistentVolumeClaim; `own` is the one that the run makes for itself."""
        if name in self.mounts:
            return self.mounts[name]
        if name == own:
            return self._generated_claim
        raise LocalError(f"claim {name}: no directory is given: add --mount {name}=DIR")

    def _read_mounts(self) -> dict[str, Path]:
        try:
            return {name: Path(path) for name, path in json.loads(self._mounts_file.read_text()).items()}
        except FileNotFoundError:
            return {}

    def _path(self, kind: str, name: str) -> Path:
        if kind not in KINDS or "/" in name:
            raise StateError(f"{kind} {name}: not an object that a laptop keeps")
        return self._directory / f"{kind}-{name}.json"


def _texts(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: content.hex() for name, content in files.items()}


def _directory_files(directory: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in directory.iterdir() if entry.is_file()}


def missing_sources(spec: Mapping[str, Any], objects: Objects) -> tuple[str, ...]:
    """What the spec names and nobody gave, each with its remedy. Fields are those of EsperTrainingRun."""
    problems: list[str] = []

    def need(field: str, kind: str, name: str, *, key: str | None = None) -> None:
        if kind == "PersistentVolumeClaim":
            if name not in objects.mounts:
                problems.append(f"{field}: claim {name!r} has no directory here: add --mount {name}=DIR")
            return
        files = objects.files(kind, name)
        if files is None:
            problems.append(
                f"{field}: {kind} {name!r} is not in the manifest: add it as a document, or --mount {name}=DIR"
            )
        elif key is not None and key not in files:
            problems.append(f"{field}: {kind} {name!r} has no key {key!r}; it has {', '.join(sorted(files)) or 'none'}")

    runtime = spec.get("runtime", {})
    if code := runtime.get("codeConfigMapName"):
        need("spec.runtime.codeConfigMapName", "ConfigMap", code)
    for index, variable in enumerate(runtime.get("env", ())):
        for source, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
            if reference := variable.get(source):
                field = f"spec.runtime.env[{index}].{source}"
                need(field, kind, reference["name"], key=reference["key"])
    for index, volume in enumerate(spec.get("workers", {}).get("pod", {}).get("volumes", ())):
        field = f"spec.workers.pod.volumes[{index}]"
        for source, kind in _VOLUME_SOURCES.items():
            if name := volume.get(source):
                need(f"{field}.{source}", kind, name)
    if claim := spec.get("checkpoint", {}).get("storage", {}).get("claimName"):
        need("spec.checkpoint.storage.claimName", "PersistentVolumeClaim", claim)
    return tuple(problems)


_VOLUME_SOURCES = {"claimName": "PersistentVolumeClaim", "configMapName": "ConfigMap", "secretName": "Secret"}
