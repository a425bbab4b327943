"""The Job lives: keep its children as desired and say when to look again."""

from datetime import timedelta

from esper_leyline import labels
from esper_leyline.reasons import RunReason

from esper_operator import build
from esper_operator.model import Child, Observation, Plan, Verdict
from esper_operator.observe.acceptance import problems_of
from esper_operator.observe.attempt import newest_pods, pod_end, training_pods
from esper_operator.observe.timing import active_seconds, claim_patience_s, starting_since
from esper_operator.policy.plans import remaining, wait


def node_lost(seen: Observation) -> Plan | None:
    """The node of a pod is unreachable. Its pod may still train: wait for the node, or for a person."""
    lost = next((pod for pod in newest_pods(seen) if pod.node_lost), None)
    if lost is None:
        return None
    return wait(RunReason.NODE_LOST, f"node {lost.node} of pod {lost.name} is unreachable", next_look_s(seen))


def converged(seen: Observation) -> Plan:
    """Nothing to do but to keep the children; a changed configuration is pushed into the pods' mounts."""
    children = (
        () if problems_of(seen) else build.children(seen.run, seen.settings, seen.resume.uid if seen.resume else None)
    )
    touch = _config_hash(children)
    stale = any(p.config_hash not in ("", touch) for p in newest_pods(seen) if pod_end(p) is None)
    return Plan(
        verdict=Verdict(RunReason.CONFIG_CHANGED if touch and stale else RunReason.TRAINING, "the Job runs"),
        children=children,
        touch_pods=touch if touch and stale else None,
        requeue_after_s=next_look_s(seen),
    )


def _config_hash(children: tuple[Child, ...]) -> str:
    """Of the rendered configuration, as the builder wrote it on <run>-config; empty when it is not there."""
    for child in children:
        annotations = child.manifest["metadata"].get("annotations") or {}
        if child.manifest["kind"] == "ConfigMap" and labels.CONFIG_HASH in annotations:
            return str(annotations[labels.CONFIG_HASH])
    return ""


def next_look_s(seen: Observation) -> float | None:
    """When time alone changes something: a deadline, or reports that stay away."""
    spec = seen.run.spec
    times = []
    since = starting_since(seen)
    if since is not None:
        times.append(remaining(seen, since + timedelta(seconds=spec.startup_deadline_seconds)))
    if spec.active_deadline_seconds is not None and seen.run.status.start_time is not None:
        times.append(max(0.0, spec.active_deadline_seconds - active_seconds(seen)))
    if training_pods(seen) and seen.report_age_s is not None:
        silence = spec.health.heartbeat_timeout_seconds - seen.report_age_s
        times += [silence] if silence > 0 else []
    patience = (claim_patience_s(seen, pod) for pod in newest_pods(seen))
    times += [seconds for seconds in patience if seconds]
    return min(times, default=None)
