"""Volumes of a pod and who mounts them, and the claim that a run makes for itself."""

from typing import Any

from esper_leyline import labels, paths, signing
from esper_leyline.paths import POD

from esper_operator.api.v1alpha1 import Volume
from esper_operator.build import names
from esper_operator.model import Child, Manifest, ResumeSource, Run, Settings

RUN = "run"
SHM = "shm"
CHECKPOINTS = "checkpoints"
RESUME = "resume-from"
CONFIG = "config"
CODE = "code"
EMERGENCY = "emergency"
BUS = "bus"
TMP = "tmp"
DATA_PREFIX = "data-"
"""Before the names of the user's volumes, so that they never meet ours."""

RUN_SIZE = "64Mi"
TMP_SIZE = "4Gi"
READ_BY_GROUP = 0o440


def claim(run: Run) -> tuple[Child, ...]:
    """<run>-checkpoints, create-only; none when the user names a claim. It outlives the run unless whenDeleted is
    Delete."""
    template = run.spec.checkpoint.storage.claim_template
    if template is None:
        return ()
    spec: dict[str, Any] = {
        "accessModes": [template.access_mode],
        "resources": {"requests": {"storage": template.size}},
    }
    if template.storage_class_name is not None:
        spec["storageClassName"] = template.storage_class_name
    manifest = names.child(run, "v1", "PersistentVolumeClaim", labels.claim_name(run.key.name), spec=spec)
    if template.when_deleted == "Retain":
        del manifest["metadata"]["ownerReferences"]
    return (Child(manifest=manifest, create_only=True),)


def claim_name(run: Run) -> str:
    """The claim that holds the run's checkpoints."""
    return run.spec.checkpoint.storage.claim_name or labels.claim_name(run.key.name)


def checkpoint_directory(run: Run, settings: Settings) -> str:
    """Where the trainer finds its checkpoints: as the spec says in a pod, as the layout says elsewhere."""
    if settings.layout.checkpoints == POD.checkpoints:
        return run.spec.checkpoint.storage.mount_path
    return settings.layout.checkpoints


def volumes(run: Run, source: ResumeSource | None = None) -> list[Manifest]:
    """All volumes of a pod."""
    name, spec = run.key.name, run.spec
    found: list[Manifest] = [
        {"name": RUN, "emptyDir": {"medium": "Memory", "sizeLimit": RUN_SIZE}},
        {"name": SHM, "emptyDir": {"medium": "Memory", "sizeLimit": spec.workers.shared_memory_size}},
        {"name": TMP, "emptyDir": {"sizeLimit": TMP_SIZE}},
        {"name": CHECKPOINTS, "persistentVolumeClaim": {"claimName": claim_name(run)}},
        {"name": CONFIG, "configMap": {"name": labels.config_map_name(name)}},
        {"name": EMERGENCY, "configMap": {"name": labels.emergency_config_map_name(name)}},
        {
            "name": BUS,
            "secret": {"secretName": labels.bus_secret_name(name), "defaultMode": READ_BY_GROUP, "optional": True},
        },
    ]
    if source is not None and source.claim:
        found.append({"name": RESUME, "persistentVolumeClaim": {"claimName": source.claim}})
    found += [_keys(run, container) for container in labels.SIDECARS]
    if spec.runtime.code_config_map_name is not None:
        found.append({"name": CODE, "configMap": {"name": spec.runtime.code_config_map_name}})
    return found + [_data(volume) for volume in spec.workers.pod.volumes]


def keys_volume(container: str) -> str:
    return f"keys-{container}"


def _keys(run: Run, container: str) -> Manifest:
    items = [{"key": item, "path": item} for item in signing.KEY_ITEMS[container]]
    secret = {
        "secretName": labels.keys_secret_name(run.key.name),
        "defaultMode": READ_BY_GROUP,
        "items": items,
    }
    return {"name": keys_volume(container), "secret": secret}


def _data(volume: Volume) -> Manifest:
    found: Manifest = {"name": DATA_PREFIX + volume.name}
    if volume.claim_name is not None:
        found["persistentVolumeClaim"] = {"claimName": volume.claim_name, "readOnly": volume.read_only}
    elif volume.config_map_name is not None:
        found["configMap"] = {"name": volume.config_map_name}
    elif volume.secret_name is not None:
        found["secret"] = {"secretName": volume.secret_name, "defaultMode": READ_BY_GROUP}
    else:
        found["emptyDir"] = {"sizeLimit": volume.empty_dir_size}
    return found


def common_mounts(settings: Settings) -> list[Manifest]:
    """Of every container."""
    layout = settings.layout
    return [_mount(RUN, layout.run), _mount(TMP, layout.tmp), _mount(CONFIG, layout.config, read_only=True)]


def sidecar_mounts(container: str, settings: Settings) -> list[Manifest]:
    layout = settings.layout
    found = [*common_mounts(settings), _mount(keys_volume(container), layout.keys, read_only=True)]
    if container == labels.WEATHERLIGHT:
        found.append(_mount(BUS, layout.bus, read_only=True))
        # The whole directory and never a subPath: only so does the kubelet refresh it while the pod runs.
        found.append(_mount(EMERGENCY, layout.emergency, read_only=True))
    return found


def trainer_mounts(run: Run, settings: Settings, source: ResumeSource | None = None) -> list[Manifest]:
    """The source's own directory appears, read-only, beside this run's in the checkpoint directory."""
    storage = run.spec.checkpoint.storage
    found = [
        *common_mounts(settings),
        _mount(SHM, settings.layout.shm),
        _mount(CHECKPOINTS, checkpoint_directory(run, settings), sub_path=storage.sub_path),
    ]
    if source is not None and source.claim:
        path = f"{checkpoint_directory(run, settings)}/{source.uid}"
        below = f"{source.sub_path}/{source.uid}" if source.sub_path else source.uid
        found.append(_mount(RESUME, path, sub_path=below, read_only=True))
    if run.spec.runtime.code_config_map_name is not None:
        found.append(_mount(CODE, settings.layout.code, read_only=True))
    return found + [
        _mount(DATA_PREFIX + v.name, v.mount_path, sub_path=v.sub_path, read_only=v.read_only)
        for v in run.spec.workers.pod.volumes
    ]


def _mount(name: str, path: str, *, sub_path: str | None = None, read_only: bool = False) -> Manifest:
    found: Manifest = {"name": name, "mountPath": path}
    if sub_path is not None:
        found["subPath"] = sub_path
    if read_only:
        found["readOnly"] = True
    return found


def config_file(settings: Settings) -> str:
    return f"{settings.layout.config}/{paths.RUN_CONFIG}"
