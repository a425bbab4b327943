"""Rules across the pod fields of a run: what the API server would refuse of the pod, said before there is one."""

import re
from collections.abc import Iterator

from esper_operator.api.base import QUALIFIED_PATTERN
from esper_operator.api.podfields import (
    LabelRequirement,
    LabelSelector,
    NodeSelectorTerm,
    Requirement,
    Toleration,
)
from esper_operator.api.v1alpha1 import Spec
from esper_operator.model import Problem, RunKey, Settings

_QUALIFIED = re.compile(QUALIFIED_PATTERN)
_JOB_LABELS = ("job-name", "controller-uid")
_SAFE_TO_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict"
_POD = "spec.workers.pod"


def qualified(name: str) -> bool:
    """Whether `name` is a label key: at most 63 characters, with or without a prefix of at most 253."""
    prefix, _, rest = name.rpartition("/")
    return bool(_QUALIFIED.fullmatch(name)) and len(rest) <= 63 and len(prefix) <= 253


def metadata(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    """Keys of labels, annotations and the node selector."""
    pod = spec.workers.pod
    for part, keys in (
        ("labels", pod.labels or {}),
        ("annotations", pod.annotations or {}),
        ("nodeSelector", pod.node_selector or {}),
    ):
        for key in keys:
            field = f"{_POD}.{part}.{key[:80]}"
            if not qualified(key):
                yield Problem(field, "is no valid key: use name or prefix/name of letters, digits, '-', '_' and '.'")
            if part == "labels" and _own_label(key):
                yield Problem(field, "is the operator's: use a prefix of your own")
            if part == "annotations" and _own_annotation(key):
                yield Problem(field, "is the operator's: use a prefix of your own")


def _own_label(key: str) -> bool:
    return key.startswith("esper.dev/") or "k8s.io/" in key or "kubernetes.io/" in key or key in _JOB_LABELS


def _own_annotation(key: str) -> bool:
    return key != _SAFE_TO_EVICT and (key.startswith("esper.dev/") or "kubernetes.io/" in key)


def tolerations(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    for i, each in enumerate(spec.workers.pod.tolerations or ()):
        yield from _toleration(f"{_POD}.tolerations[{i}]", each)


def _toleration(field: str, each: Toleration) -> Iterator[Problem]:
    if each.key is None and each.operator != "Exists":
        yield Problem(field, "without key needs operator: Exists")
    if each.operator == "Exists" and each.value:
        yield Problem(field, "with operator: Exists takes no value: remove it")
    if each.toleration_seconds is not None and each.effect != "NoExecute":
        yield Problem(field, "tolerationSeconds needs effect: NoExecute")


def affinity(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    for field, term in _node_terms(spec):
        for i, requirement in enumerate(term.match_expressions or ()):
            yield from _requirement(f"{field}.matchExpressions[{i}]", requirement)
        for i, requirement in enumerate(term.match_fields or ()):
            yield from _match_field(f"{field}.matchFields[{i}]", requirement)
    for field, selector in _selectors(spec):
        for i, each in enumerate(selector.match_expressions or ()):
            yield from _requirement(f"{field}.matchExpressions[{i}]", each)


def _node_terms(spec: Spec) -> Iterator[tuple[str, NodeSelectorTerm]]:
    nodes = spec.workers.pod.affinity and spec.workers.pod.affinity.node_affinity
    if not nodes:
        return
    field = f"{_POD}.affinity.nodeAffinity"
    required = nodes.required_during_scheduling_ignored_during_execution
    if required:
        where = f"{field}.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
        for i, term in enumerate(required.node_selector_terms):
            yield f"{where}[{i}]", term
    for i, preferred in enumerate(nodes.preferred_during_scheduling_ignored_during_execution or ()):
        yield f"{field}.preferredDuringSchedulingIgnoredDuringExecution[{i}].preference", preferred.preference


def _selectors(spec: Spec) -> Iterator[tuple[str, LabelSelector]]:
    pods = spec.workers.pod.affinity and spec.workers.pod.affinity.pod_anti_affinity
    if not pods:
        return
    field = f"{_POD}.affinity.podAntiAffinity"
    for i, term in enumerate(pods.required_during_scheduling_ignored_during_execution or ()):
        if term.label_selector:
            yield f"{field}.requiredDuringSchedulingIgnoredDuringExecution[{i}].labelSelector", term.label_selector
    for i, weighted in enumerate(pods.preferred_during_scheduling_ignored_during_execution or ()):
        selector = weighted.pod_affinity_term.label_selector
        if selector:
            where = f"{field}.preferredDuringSchedulingIgnoredDuringExecution[{i}].podAffinityTerm.labelSelector"
            yield where, selector


def _requirement(field: str, each: Requirement | LabelRequirement) -> Iterator[Problem]:
    values = each.values or ()
    if each.operator in ("In", "NotIn") and not values:
        yield Problem(field, f"operator: {each.operator} needs values")
    if each.operator in ("Exists", "DoesNotExist") and values:
        yield Problem(field, f"operator: {each.operator} takes no values: remove them")
    if each.operator in ("Gt", "Lt") and not (len(values) == 1 and re.fullmatch(r"-?[0-9]+", values[0])):
        yield Problem(field, f"operator: {each.operator} needs exactly one value, a whole number")


def _match_field(field: str, each: Requirement) -> Iterator[Problem]:
    if each.key != "metadata.name" or each.operator not in ("In", "NotIn") or len(each.values or ()) != 1:
        yield Problem(field, "must be metadata.name In or NotIn exactly one node name")
