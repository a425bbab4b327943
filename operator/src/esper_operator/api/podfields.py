"""The closed set of pod fields that a run may set. All else of the pod is the operator's.

Affinity and tolerations are spelled out instead of passed through: a free-form field would be a way past the
'restricted' Pod Security Standard the day Kubernetes adds something to it.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from esper_operator.api.base import (
    LABEL_PATTERN,
    MOUNT_PATH_PATTERN,
    Boolean,
    Integer,
    LabelValue,
    Model,
    ObjectName,
    QualifiedName,
    Quantity,
    listing,
    ruled,
    rules,
)

SYSTEM_PATHS = (
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/opt/esper", "/proc", "/root", "/run", "/sbin", "/sys", "/tmp",
    "/usr", "/var/run",
)  # fmt: skip
"""Nothing may be mounted at or below these: they hold the image, the kernel's views or the operator's volumes."""
SYSTEM_PATH_RULE = (
    f"!{list(SYSTEM_PATHS)}.exists(p, self.mountPath == p || self.mountPath.startsWith(p + '/'))",
    "`mountPath` may not be a system path or lie below one; choose one such as /data",
)
DOTS_PATTERN = r"(^|/)\\.\\.?(/|$)"
DOTS_RULES = (
    (f"!self.mountPath.matches('{DOTS_PATTERN}')", "`mountPath` may not contain '.' or '..' as a part"),
    (
        f"!has(self.subPath) || !self.subPath.startsWith('/') && !self.subPath.matches('{DOTS_PATTERN}')",
        "`subPath` must be relative and may not contain '.' or '..' as a part",
    ),
)
OWN_LABELS_RULE = (
    "self.all(k, !k.startsWith('esper.dev/') && !k.contains('k8s.io/') && !k.contains('kubernetes.io/')"
    " && !(k in ['job-name', 'controller-uid']))",
    "labels of esper.dev/, kubernetes.io/, k8s.io/ and of Jobs are the operator's; use a prefix of your own",
)
OWN_ANNOTATIONS_RULE = (
    "self.all(k, k == 'cluster-autoscaler.kubernetes.io/safe-to-evict'"
    " || !k.startsWith('esper.dev/') && !k.contains('kubernetes.io/'))",
    "annotations of esper.dev/ and kubernetes.io/ are the operator's; use a prefix of your own",
)

MountPath = Annotated[str, StringConstraints(min_length=2, max_length=512, pattern=MOUNT_PATH_PATTERN)]
SubPath = Annotated[str, StringConstraints(min_length=1, max_length=512)]
VolumeName = Annotated[str, StringConstraints(min_length=1, max_length=57, pattern=LABEL_PATTERN)]
Weight = Annotated[Integer, Field(ge=1, le=100)]
RequirementValue = Annotated[str, StringConstraints(max_length=63)]


class Toleration(Model):
    key: QualifiedName | None = None
    """Taint key; absent with Exists: every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How the taint's value is compared."""
    value: LabelValue | None = None
    """Taint value; only with Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; absent: every effect."""
    toleration_seconds: Integer | None = Field(None, ge=0, le=31536000)
    """How long a NoExecute taint is tolerated; absent: for ever."""


class Requirement(Model):
    key: QualifiedName
    """Label key."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """How the label is compared with values."""
    values: tuple[RequirementValue, ...] | None = Field(None, max_length=64, json_schema_extra=listing("atomic"))
    """Values to compare with."""


class LabelRequirement(Model):
    key: QualifiedName
    """Label key."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """How the label is compared with values."""
    values: tuple[RequirementValue, ...] | None = Field(None, max_length=64, json_schema_extra=listing("atomic"))
    """Values to compare with."""


class NodeSelectorTerm(Model):
    match_expressions: tuple[Requirement, ...] | None = Field(None, max_length=16, json_schema_extra=listing("atomic"))
    """Requirements on node labels; all must hold."""
    match_fields: tuple[Requirement, ...] | None = Field(None, max_length=16, json_schema_extra=listing("atomic"))
    """Requirements on node fields (metadata.name); all must hold."""


class NodeSelector(Model):
    node_selector_terms: tuple[NodeSelectorTerm, ...] = Field(
        min_length=1, max_length=8, json_schema_extra=listing("atomic")
    )
    """Terms of which one must hold."""


class PreferredNodes(Model):
    weight: Weight
    """Weight among preferences."""
    preference: NodeSelectorTerm
    """Nodes that are preferred."""


class NodeAffinity(Model):
    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    """Nodes that may be used at all."""
    preferred_during_scheduling_ignored_during_execution: tuple[PreferredNodes, ...] | None = Field(
        None, max_length=8, json_schema_extra=listing("atomic")
    )
    """Nodes that are better than others."""


class LabelSelector(Model):
    match_labels: Mapping[str, LabelValue] | None = Field(None, max_length=16)
    """Labels that must be equal."""
    match_expressions: tuple[LabelRequirement, ...] | None = Field(
        None, max_length=16, json_schema_extra=listing("atomic")
    )
    """Requirements on labels; all must hold."""


class PodAffinityTerm(Model):
    topology_key: QualifiedName
    """Node label that says what counts as one place."""
    label_selector: LabelSelector | None = None
    """Pods to keep away from."""
    namespaces: tuple[ObjectName, ...] | None = Field(None, max_length=16, json_schema_extra=listing("atomic"))
    """Their namespaces; absent: the run's own."""


class WeightedPodAffinityTerm(Model):
    weight: Weight
    """Weight among preferences."""
    pod_affinity_term: PodAffinityTerm
    """Pods to keep away from."""


class PodAntiAffinity(Model):
    required_during_scheduling_ignored_during_execution: tuple[PodAffinityTerm, ...] | None = Field(
        None, max_length=8, json_schema_extra=listing("atomic")
    )
    """Pods that must not be in the same place."""
    preferred_during_scheduling_ignored_during_execution: tuple[WeightedPodAffinityTerm, ...] | None = Field(
        None, max_length=8, json_schema_extra=listing("atomic")
    )
    """Pods that should not be in the same place."""


class Affinity(Model):
    node_affinity: NodeAffinity | None = None
    """Which nodes, by their labels."""
    pod_anti_affinity: PodAntiAffinity | None = None
    """Which pods to keep away from."""


class LocalObject(Model):
    name: ObjectName
    """Name of an object in the run's namespace."""


class Volume(Model):
    model_config = ruled(
        (
            "[has(self.claimName), has(self.configMapName), has(self.secretName), has(self.emptyDirSize)]"
            ".filter(x, x).size() == 1",
            "exactly one of `claimName`, `configMapName`, `secretName`, `emptyDirSize` must be set",
        ),
        SYSTEM_PATH_RULE,
        *DOTS_RULES,
    )

    name: VolumeName
    """Name of the volume, unique in the run."""
    mount_path: MountPath
    """Absolute directory in the trainer's container; no system path."""
    sub_path: SubPath | None = None
    """Directory of the volume to mount instead of its root."""
    read_only: Boolean = True
    """Mounted read-only."""
    claim_name: ObjectName | None = None
    """Source: a PersistentVolumeClaim of the namespace."""
    config_map_name: ObjectName | None = None
    """Source: a ConfigMap of the namespace."""
    secret_name: ObjectName | None = None
    """Source: a Secret of the namespace."""
    empty_dir_size: Quantity | None = None
    """Source: an empty directory on the node's disk, of at most this size."""


class PodFields(Model):
    labels: Mapping[str, LabelValue] | None = Field(None, max_length=64, json_schema_extra=rules(OWN_LABELS_RULE))
    """Additional labels of the pods."""
    annotations: Mapping[str, Annotated[str, StringConstraints(max_length=4096)]] | None = Field(
        None, max_length=64, json_schema_extra=rules(OWN_ANNOTATIONS_RULE)
    )
    """Additional annotations of the pods."""
    node_selector: Mapping[str, LabelValue] | None = Field(None, max_length=64)
    """Labels that a node must have."""
    tolerations: tuple[Toleration, ...] | None = Field(None, max_length=32, json_schema_extra=listing("atomic"))
    """Taints of nodes that the pods tolerate."""
    affinity: Affinity | None = None
    """Which nodes to use and which pods to keep away from."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass of the pods."""
    image_pull_secrets: tuple[LocalObject, ...] | None = Field(None, max_length=8, json_schema_extra=listing("atomic"))
    """Secrets for pulling images, besides the operator's own."""
    volumes: tuple[Volume, ...] = Field((), max_length=16, json_schema_extra=listing("map", "name"))
    """Data volumes, mounted into the trainer only."""
