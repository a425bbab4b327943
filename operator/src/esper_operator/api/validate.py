"""Everything that is wrong with a spec whose fields are each well formed.

What CEL in the CRD says is said again here, because an object may have come past it (an older CRD, a laptop), and
then what CEL cannot say: sizes, sums, uniqueness, what this version does not do yet. Pure; called by `observe` for
every run and by `esper validate`. A problem names the field and the remedy.
"""

import json
import re
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from itertools import combinations

from esper_leyline import env, labels
from esper_leyline.reasons import RunReason

from esper_operator.api import podrules, quantity
from esper_operator.api.crd import MAX_NAME, NAME_PATTERN
from esper_operator.api.podfields import DOTS_PATTERN, SYSTEM_PATHS
from esper_operator.api.v1alpha1 import MAX_CONFIG_BYTES, Spec, Storage, Volume
from esper_operator.model import Problem, RunKey, Settings

Check = Callable[[Spec, RunKey, Settings], Iterator[Problem]]

PROCESS_MEMORY = quantity.parse("512Mi")
"""Least memory for the trainer besides its memory volume."""
SHARED_MEMORY_LEAST = quantity.parse("1Mi")
MANAGERS = (labels.MANAGED_BY, "kueue.x-k8s.io/multikueue")
_DOTS = re.compile(DOTS_PATTERN.replace("\\\\", "\\"))
_STANDARD_RESOURCES = ("cpu", "memory", "ephemeral-storage")
_CONTAINER_RESOURCES = "cpu, memory, ephemeral-storage, hugepages-<size> or a device such as nvidia.com/gpu"


def validate(spec: Spec, key: RunKey, settings: Settings) -> tuple[Problem, ...]:
    """All problems, in the order of the spec. Empty: the run may be built."""
    return tuple(problem for check in CHECKS for problem in check(spec, key, settings))


# --- name and control ----------------------------------------------------------------------------------------


def _name(_spec: Spec, key: RunKey, _settings: Settings) -> Iterator[Problem]:
    if len(key.name) > MAX_NAME:
        yield Problem(
            "metadata.name",
            f"has {len(key.name)} characters; at most {MAX_NAME} leave room for '<name>-a<attempt>-<rank>': shorten it",
        )
    if not re.fullmatch(NAME_PATTERN, key.name):
        yield Problem("metadata.name", "must be an RFC 1035 label: small letters, digits and '-', a letter first")


def _managed_by(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    if spec.managed_by not in (None, *MANAGERS):
        yield Problem("spec.managedBy", f"must be {' or '.join(repr(m) for m in MANAGERS)}")


# --- runtime -------------------------------------------------------------------------------------------------


def _config(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    field = "spec.runtime.config"
    try:
        size = len(json.dumps(spec.runtime.config, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        yield Problem(field, f"cannot be written as JSON ({error}): use text, numbers, booleans, lists and mappings")
        return
    if size > MAX_CONFIG_BYTES:
        yield Problem(
            field,
            f"has {size} bytes as JSON; at most {MAX_CONFIG_BYTES} are allowed: put data in a volume or a ConfigMap",
        )


def _environment(spec: Spec, key: RunKey, _settings: Settings) -> Iterator[Problem]:
    seen: set[str] = set()
    for i, var in enumerate(spec.runtime.env):
        field = f"spec.runtime.env[{i}]"
        if var.name.startswith("ESPER_") or var.name in env.RESERVED:
            yield Problem(f"{field}.name", f"{var.name} is set by the operator: choose another name")
        if var.name in seen:
            yield Problem(f"{field}.name", f"{var.name} is there twice: remove one")
        seen.add(var.name)
        if sum(source is not None for source in (var.value, var.secret_key_ref, var.config_map_key_ref)) != 1:
            yield Problem(field, "exactly one of value, secretKeyRef, configMapKeyRef must be set")
        if var.secret_key_ref is not None:
            yield from _own_secret(f"{field}.secretKeyRef.name", var.secret_key_ref.name, key)


def _own_secret(field: str, name: str, key: RunKey) -> Iterator[Problem]:
    """The trainer runs user code and must not get the keys that sign reports and commands."""
    if name in (labels.keys_secret_name(key.name), labels.bus_secret_name(key.name)):
        yield Problem(field, f"{name} holds the operator's credentials for this run: name another Secret")


# --- workers -------------------------------------------------------------------------------------------------


def _workers(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    workers = spec.workers
    elastic = workers.elastic
    if elastic is not None and not elastic.min_count <= workers.count <= elastic.max_count:
        yield Problem(
            "spec.workers.count",
            f"is {workers.count}; must be from elastic.minCount {elastic.min_count} to maxCount {elastic.max_count}",
        )


def _resources(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    resources = spec.workers.resources
    amounts: dict[str, dict[str, Fraction]] = {"limits": {}, "requests": {}}
    for part, given in (("limits", resources.limits), ("requests", resources.requests)):
        for name, text in given.items():
            field = f"spec.workers.resources.{part}.{name}"
            yield from _resource_name(field, name)
            amount = yield from _amount(field, text, least=Fraction(0))
            if amount is not None:
                amounts[part][name] = amount
    for name, asked in amounts["requests"].items():
        limit = amounts["limits"].get(name)
        field = f"spec.workers.resources.requests.{name}"
        if limit is not None and asked > limit:
            yield Problem(field, f"is greater than the limit {resources.limits[name]}: lower it or raise the limit")
        elif "/" in name and limit != asked:
            yield Problem(field, "must equal the limit of this device: set both to the same number, or only the limit")


def _resource_name(field: str, name: str) -> Iterator[Problem]:
    domain, _, rest = name.rpartition("/")
    if domain and "kubernetes.io" not in domain and podrules.qualified(name) and rest:
        return
    if name not in _STANDARD_RESOURCES and not re.fullmatch(r"hugepages-[0-9]+[KMG]i", name):
        yield Problem(field, f"is no resource of a container: use {_CONTAINER_RESOURCES}")


def _amount(field: str, text: str, *, least: Fraction) -> Generator[Problem, None, Fraction | None]:
    try:
        amount = quantity.parse(text)
    except ValueError as error:
        yield Problem(field, str(error))
        return None
    if amount < least:
        yield Problem(field, f"is {text}; must be at least {quantity.binary(least)}")
        return None
    return amount


def _memory(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    workers = spec.workers
    shared = yield from _amount("spec.workers.sharedMemorySize", workers.shared_memory_size, least=SHARED_MEMORY_LEAST)
    limit = workers.resources.limits.get("memory")
    if shared is None or limit is None:
        return
    try:
        enough = quantity.parse(limit) >= shared + PROCESS_MEMORY
    except ValueError:
        return  # said by _resources
    if not enough:
        total = quantity.binary(shared + PROCESS_MEMORY)
        yield Problem(
            "spec.workers.resources.limits.memory",
            f"is {limit}, but /dev/shm counts against it: sharedMemorySize {workers.shared_memory_size} + 512Mi for the"
            f" trainer = {total} at least. Raise the limit or lower sharedMemorySize",
        )


# --- volumes -------------------------------------------------------------------------------------------------


def _volumes(spec: Spec, key: RunKey, _settings: Settings) -> Iterator[Problem]:
    seen: set[str] = set()
    for i, volume in enumerate(spec.workers.pod.volumes):
        field = f"spec.workers.pod.volumes[{i}]"
        if volume.name in seen:
            yield Problem(f"{field}.name", f"{volume.name} is there twice: give each volume a name of its own")
        seen.add(volume.name)
        sources = (volume.claim_name, volume.config_map_name, volume.secret_name, volume.empty_dir_size)
        if sum(source is not None for source in sources) != 1:
            yield Problem(field, "exactly one of claimName, configMapName, secretName, emptyDirSize must be set")
        if volume.secret_name is not None:
            yield from _own_secret(f"{field}.secretName", volume.secret_name, key)
        if volume.empty_dir_size is not None:
            yield from _amount(f"{field}.emptyDirSize", volume.empty_dir_size, least=Fraction(1))
        yield from _paths(field, volume)


def _storage(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    storage, field = spec.checkpoint.storage, "spec.checkpoint.storage"
    if (storage.claim_name is None) == (storage.claim_template is None):
        yield Problem(field, "exactly one of claimName and claimTemplate must be set")
    if storage.claim_template is not None:
        yield from _amount(f"{field}.claimTemplate.size", storage.claim_template.size, least=Fraction(1))
    yield from _paths(field, storage)


def _paths(field: str, mount: Volume | Storage) -> Iterator[Problem]:
    path = mount.mount_path
    if any(path == system or path.startswith(system + "/") for system in SYSTEM_PATHS):
        yield Problem(f"{field}.mountPath", f"{path} is a system path or lies below one: choose one such as /data")
    if _DOTS.search(path):
        yield Problem(f"{field}.mountPath", f"{path} may not contain '.' or '..' as a part")
    if mount.sub_path is not None and (mount.sub_path.startswith("/") or _DOTS.search(mount.sub_path)):
        yield Problem(f"{field}.subPath", f"{mount.sub_path} must be relative, without '.' or '..' as a part")


def _overlaps(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    mounts = [("spec.checkpoint.storage.mountPath", spec.checkpoint.storage.mount_path)]
    mounts += [
        (f"spec.workers.pod.volumes[{i}].mountPath", volume.mount_path)
        for i, volume in enumerate(spec.workers.pod.volumes)
    ]
    for (field, path), (other_field, other) in combinations(mounts, 2):
        if f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/"):
            yield Problem(other_field, f"{other} and {path} ({field}) lie in each other: mount them side by side")


# --- checkpoint, rollback, restart ---------------------------------------------------------------------------


def _resume(spec: Spec, key: RunKey, _settings: Settings) -> Iterator[Problem]:
    source = spec.checkpoint.resume_from
    if source is None:
        return
    if source.run_name == key.name:
        yield Problem("spec.checkpoint.resumeFrom.runName", "is this run itself, which resumes anyway: remove it")
    if source.step is not None and source.select != "LatestVerified":
        yield Problem("spec.checkpoint.resumeFrom", "step and select: Best exclude each other; remove one")


def _factors(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    if float(spec.rollback.learning_rate_scale) == 0:
        yield Problem("spec.rollback.learningRateScale", "is 0, which would end all learning: give a factor above 0")
    if float(spec.health.loss_spike.threshold) == 0:
        yield Problem("spec.health.lossSpike.threshold", "is 0, so every step would be a spike: give one above 0")


def _backoff(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    restart = spec.restart
    if restart.initial_backoff_seconds > restart.max_backoff_seconds:
        yield Problem(
            "spec.restart.initialBackoffSeconds",
            f"is {restart.initial_backoff_seconds}; must not be greater than maxBackoffSeconds"
            f" {restart.max_backoff_seconds}",
        )


def _sets(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    if len(set(spec.emergency.channels)) != len(spec.emergency.channels):
        yield Problem("spec.emergency.channels", "names a channel twice: remove one")
    for i, rule in enumerate(spec.restart.exit_codes):
        if len(set(rule.values)) != len(rule.values):
            yield Problem(f"spec.restart.exitCodes[{i}].values", "names a code twice: remove one")


# --- faults and what is not there yet ------------------------------------------------------------------------


def _faults(spec: Spec, _key: RunKey, settings: Settings) -> Iterator[Problem]:
    if spec.fault_injection and not settings.fault_injection:
        yield Problem(
            "spec.faultInjection",
            "is refused by this operator: remove it, or install the chart with faultInjection.enabled=true",
            RunReason.FAULT_INJECTION_DISABLED,
        )
    for i, fault in enumerate(spec.fault_injection):
        if fault.kind == "SlowStep" and fault.milliseconds is None:
            yield Problem(f"spec.faultInjection[{i}]", "kind: SlowStep needs milliseconds")
        if fault.rank >= spec.workers.count:
            yield Problem(
                f"spec.faultInjection[{i}].rank",
                f"is {fault.rank}, but ranks are 0 to {spec.workers.count - 1} (workers.count)",
            )


def _unsupported(spec: Spec, _key: RunKey, _settings: Settings) -> Iterator[Problem]:
    """Valid, and meant to work in a later version. Refused, because ignoring it would be a lie."""
    workers, restart = spec.workers, spec.restart
    for asked, field, remedy in (
        (workers.count > 1, "workers.count", "one worker pod per run for now: set it to 1"),
        (workers.elastic is not None, "workers.elastic", "the number of workers is fixed for now: remove it"),
        (
            workers.processes_per_worker not in ("auto", 1),
            "workers.processesPerWorker",
            "one trainer process per pod for now: set it to auto or 1",
        ),
        (spec.scheduling.gang != "None", "scheduling.gang", "one pod needs no gang: set it to None"),
        (
            spec.checkpoint.memory.mode == "Replicated",
            "checkpoint.memory.mode",
            "snapshots stay in their pod for now: set it to Local",
        ),
        (
            restart.avoid_failed_nodes != "Never",
            "restart.avoidFailedNodes",
            "nodes are not avoided for now: set it to Never and use pod.affinity to keep away from a node",
        ),
    ):
        if asked:
            yield Problem(f"spec.{field}", f"this version does not do that yet; {remedy}", RunReason.UNSUPPORTED)


CHECKS: tuple[Check, ...] = (
    _name,
    _managed_by,
    _config,
    _environment,
    _workers,
    _resources,
    _memory,
    podrules.metadata,
    podrules.tolerations,
    podrules.affinity,
    _volumes,
    _storage,
    _overlaps,
    _resume,
    _factors,
    _backoff,
    _sets,
    _faults,
    _unsupported,
)
