"""The two ConfigMaps of a run: what it is to do, and whether it is to stop."""

from typing import Any

from esper_leyline import labels, runconfig
from esper_leyline.paths import RUN_CONFIG

from esper_operator.api import quantity
from esper_operator.build import hashes, names
from esper_operator.model import Child, Run


def run_config(run: Run, resume_uid: str | None) -> Child:
    """<run>-config: run.json. Follows the spec; the annotation tells pods apart that have not seen the change."""
    manifest = names.child(
        run,
        "v1",
        "ConfigMap",
        labels.config_map_name(run.key.name),
        data={RUN_CONFIG: _render(run, resume_uid)},
    )
    manifest["metadata"]["annotations"] = {labels.CONFIG_HASH: config_hash(run)}
    return Child(manifest=manifest)


def config_hash(run: Run) -> str:
    """Of run.json without the source to resume from, which matters only to a run that has no state yet."""
    return hashes.short(_render(run, None))


def emergency(run: Run) -> Child:
    """<run>-emergency: made empty; from then on its data belongs to the writer of emergency signals."""
    name = labels.emergency_config_map_name(run.key.name)
    return Child(manifest=names.child(run, "v1", "ConfigMap", name), create_only=True)


def _in_bytes(spec: dict[str, Any]) -> dict[str, Any]:
    """The runtime reads no quantities: sizes become numbers of bytes."""
    checkpoint = spec["checkpoint"]
    for section in (checkpoint.get("memory", {}), checkpoint.get("retention", {})):
        size = section.pop("maxSize", None)
        if size is not None:
            section["maxBytes"] = int(quantity.parse(size))
    return spec


def _render(run: Run, resume_uid: str | None) -> str:
    return runconfig.render(
        name=run.key.name,
        namespace=run.key.namespace,
        uid=run.uid,
        spec=_in_bytes(run.spec.to_dict()),
        resume_uid=resume_uid if run.spec.checkpoint.resume_from is not None else None,
    )
