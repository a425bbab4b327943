"""Reads a manifest: one EsperTrainingRun, with the ConfigMaps and Secrets that it names, as YAML or JSON."""

import base64
import binascii
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from esper_leyline import labels

from esper_runtime.local.errors import ManifestError

MAX_BYTES = 8 * 1024 * 1024
DEFAULT_NAMESPACE = "default"
STDIN = "-"


@dataclass(frozen=True, slots=True)
class Source:
    """A ConfigMap or Secret of the manifest: its files by key."""

    files: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """The content of one manifest."""

    run: dict[str, Any]
    """The EsperTrainingRun; metadata.name is there, metadata.namespace is filled in."""
    config_maps: Mapping[str, Source]
    secrets: Mapping[str, Source]


def load(path: str, *, namespace: str | None = None) -> Documents:
    """Reads `path` ("-" = standard input). ManifestError says what is wrong; the spec itself is not judged here."""
    return parse(_read(path), where="standard input" if path == STDIN else path, namespace=namespace)


def _read(path: str) -> str:
    try:
        raw = sys.stdin.buffer.read(MAX_BYTES + 1) if path == STDIN else _read_file(Path(path))
    except OSError as error:
        raise ManifestError(
            f"{path}: {error.strerror}: give the path of a manifest, or - for standard input"
        ) from error
    if len(raw) > MAX_BYTES:
        raise ManifestError(f"{path}: longer than {MAX_BYTES >> 20} MiB: data belongs in a volume, not in a manifest")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def parse(text: str, *, where: str, namespace: str | None = None) -> Documents:
    """The documents of `text`; `where` names it in messages."""
    runs: list[dict[str, Any]] = []
    sources: dict[str, dict[str, Source]] = {"ConfigMap": {}, "Secret": {}}
    for number, document in enumerate(_documents(text, where), start=1):
        place = f"{where}, document {number}"
        kind = document.get("kind")
        if kind == labels.KIND:
            runs.append(_run(document, place, namespace))
        elif isinstance(kind, str) and kind in sources:
            sources[kind][_name(document, place)] = _source(document, kind, place)
        else:
            raise ManifestError(
                f"{place}: kind is {kind!r}; `esper run` takes one {labels.KIND} with the ConfigMaps and Secrets that "
                "it names: remove this document"
            )
    if len(runs) != 1:
        raise ManifestError(f"{where}: has {len(runs)} documents of kind {labels.KIND}; exactly one is needed")
    return Documents(run=runs[0], config_maps=sources["ConfigMap"], secrets=sources["Secret"])


def _documents(text: str, where: str) -> list[dict[str, Any]]:
    try:
        found = [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
    except yaml.YAMLError as error:
        raise ManifestError(f"{where}: no valid YAML: {' '.join(str(error).split())}") from error
    for number, document in enumerate(found, start=1):
        if not isinstance(document, dict):
            raise ManifestError(f"{where}, document {number}: must be an object with apiVersion, kind and metadata")
    return found


def _run(document: dict[str, Any], place: str, namespace: str | None) -> dict[str, Any]:
    version = document.get("apiVersion")
    if version != labels.API_VERSION:
        raise ManifestError(f"{place}: apiVersion is {version!r}; must be {labels.API_VERSION!r}")
    unknown = sorted(set(document) - {"apiVersion", "kind", "metadata", "spec", "status"})
    if unknown:
        raise ManifestError(f"{place}: unknown field {unknown[0]!r}: remove it, or move it below spec")
    name = _name(document, place)
    metadata = dict(document["metadata"])
    given = metadata.get("namespace")
    if namespace is not None and given is not None and given != namespace:
        raise ManifestError(
            f"{place}: metadata.namespace is {given!r} but --namespace is {namespace!r}: make them equal or drop one"
        )
    metadata |= {"name": name, "namespace": namespace or given or DEFAULT_NAMESPACE}
    return {**document, "metadata": metadata}


def _name(document: Mapping[str, Any], place: str) -> str:
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ManifestError(f"{place}: metadata.name is missing: add it")
    return name


def _source(document: Mapping[str, Any], kind: str, place: str) -> Source:
    encoded, plain = ("binaryData", "data") if kind == "ConfigMap" else ("data", "stringData")
    files: dict[str, bytes] = {}
    for key, value in _texts(document, encoded, place):
        try:
            files[key] = base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise ManifestError(f"{place}: {encoded}.{key} is no base64: {error}") from error
    for key, value in _texts(document, plain, place):
        files[key] = value.encode()
    for key in files:
        if "/" in key or key in ("", ".", ".."):
            raise ManifestError(f"{place}: key {key!r} is no file name: use letters, digits, '-', '_' and '.'")
    return Source(files)


def _texts(document: Mapping[str, Any], section: str, place: str) -> list[tuple[str, str]]:
    found = document.get(section) or {}
    if not isinstance(found, Mapping):
        raise ManifestError(f"{place}: {section} must be an object of texts")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ManifestError(f"{place}: {section}.{key} must be a text: put it in quotes")
    return list(found.items())


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice: the first would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} stands twice: remove one", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# A date in an annotation is a text in Kubernetes; YAML 1.1 would make it a date object.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
