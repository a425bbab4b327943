"""run.json: what the operator tells the runtime about its run.

The content is the run's spec in the resource's own words (camelCase, defaults filled in), cut down to what the
runtime uses. Reading is strict about version and types and silent about unknown keys, so that an older runtime
image works under a newer operator. Durations are seconds, sizes bytes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from esper_leyline.phases import FaultKind

VERSION = 1
T = TypeVar("T")
_MAX_SHOWN = 80
_TYPE_NAMES: dict[type, str] = {str: "a string", int: "an integer", dict: "an object", list: "a list"}


class RunConfigError(ValueError):
    """run.json cannot be used; the message names the key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    keep_latest: int = 3
    keep_best: int = 1
    keep_every_steps: int = 0
    max_age_seconds: int = 0
    """0: no limit."""
    max_bytes: int = 0
    """0: no limit."""
    metric: str = "loss"
    mode: str = "Min"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeFrom:
    run_uid: str
    step: int | None = None
    select: str = "LatestVerified"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    every_steps: int | None = None
    period_seconds: int | None = None
    memory_mode: str = "Local"
    memory_every_steps: int = 10
    memory_snapshots: int = 3
    memory_max_bytes: int = 0
    """Of all snapshots of a process together; 0: what the memory volume offers."""
    verification: str = "Checksum"
    retention: Retention = field(default_factory=Retention)
    resume_from: ResumeFrom | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    heartbeat_timeout_seconds: int = 60
    progress_timeout_seconds: int = 600
    non_finite_action: str = "Rollback"
    loss_spike_action: str = "Rollback"
    loss_spike_window_steps: int = 100
    loss_spike_threshold: float = 3.0
    loss_spike_consecutive_steps: int = 3
    gradient_norm_action: str = "Ignore"
    gradient_norm_factor: float = 5.0
    gradient_norm_consecutive_steps: int = 3
    validation_action: str = "Ignore"
    validation_max_drop: float = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollback:
    max_rollbacks: int = 3
    window_seconds: int = 86400
    target: str = "BeforeAnomaly"
    learning_rate_scale: float = 1.0
    skip_batches: str = "Anomalous"
    on_exhausted: str = "Halt"
    fast_deadline_milliseconds: int = 500
    full_deadline_seconds: int = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    max_restarts: int = 10
    strategy: str = "Auto"
    initial_backoff_seconds: int = 5
    max_backoff_seconds: int = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Profiler:
    """Steps to trace, from `first_step`; `repeat` times, `every_steps` apart."""

    first_step: int
    active_steps: int = 10
    every_steps: int = 0
    repeat: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    kind: FaultKind
    step: int
    rank: int = 0
    milliseconds: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything the runtime knows about its run besides the environment."""

    name: str
    namespace: str
    uid: str
    entrypoint: str
    config: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 1
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    health: Health = field(default_factory=Health)
    rollback: Rollback = field(default_factory=Rollback)
    restart: Restart = field(default_factory=Restart)
    profiler: Profiler | None = None
    faults: tuple[Fault, ...] = ()


def render(*, name: str, namespace: str, uid: str, spec: Mapping[str, Any], resume_uid: str | None = None) -> str:
    """run.json for a run whose `spec` has its defaults filled in. Keys are sorted, so equal runs give equal bytes.

    resume_uid is the UID behind checkpoint.resumeFrom.runName, which only the operator can look up.
    """
    runtime = spec["runtime"]
    checkpoint = {
        key: spec["checkpoint"][key]
        for key in ("everySteps", "periodSeconds", "memory", "verification", "retention")
        if key in spec["checkpoint"]
    }
    if resume_uid is not None:
        source = dict(spec["checkpoint"]["resumeFrom"])
        source.pop("runName")
        checkpoint["resumeFrom"] = {**source, "runUID": resume_uid}
    document = {
        "version": VERSION,
        "name": name,
        "namespace": namespace,
        "uid": uid,
        "entrypoint": runtime["entrypoint"],
        "config": runtime.get("config") or {},
        "worldSize": spec.get("workers", {}).get("count", 1),
        "checkpoint": checkpoint,
        "health": spec.get("health", {}),
        "rollback": spec.get("rollback", {}),
        "restart": {
            key: value
            for key, value in spec.get("restart", {}).items()
            if key in ("maxRestarts", "strategy", "initialBackoffSeconds", "maxBackoffSeconds")
        },
        "faultInjection": spec.get("faultInjection", []),
    }
    if runtime.get("profiler") is not None:
        document["profiler"] = runtime["profiler"]
    return json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"


def parse(text: str) -> RunConfig:
    """RunConfigError names the key that is missing, of the wrong type, or of an unknown version."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise RunConfigError(f"run.json is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RunConfigError("run.json must hold an object")
    if type(raw.get("version")) is not int or raw["version"] != VERSION:
        raise RunConfigError(
            f"run.json has version {_shown(raw.get('version'))}; this runtime reads {VERSION}: "
            "use an operator and a runtime image of the same release"
        )
    get = _Section("run.json", raw)
    checkpoint = get.section("checkpoint")
    health = get.section("health")
    spike = health.section("lossSpike")
    gradient = health.section("gradientNorm")
    validation = health.section("validation")
    rollback = get.section("rollback")
    restart = get.section("restart")
    return RunConfig(
        name=get.required("name", str),
        namespace=get.required("namespace", str),
        uid=get.required("uid", str),
        entrypoint=get.required("entrypoint", str),
        config=get.value("config", dict, {}),
        world_size=get.value("worldSize", int, 1),
        checkpoint=_checkpoint(checkpoint),
        health=Health(
            heartbeat_timeout_seconds=health.value("heartbeatTimeoutSeconds", int, 60),
            progress_timeout_seconds=health.value("progressTimeoutSeconds", int, 600),
            non_finite_action=health.value("nonFiniteAction", str, "Rollback"),
            loss_spike_action=spike.value("action", str, "Rollback"),
            loss_spike_window_steps=spike.value("windowSteps", int, 100),
            loss_spike_threshold=spike.decimal("threshold", 3.0),
            loss_spike_consecutive_steps=spike.value("consecutiveSteps", int, 3),
            gradient_norm_action=gradient.value("action", str, "Ignore"),
            gradient_norm_factor=gradient.decimal("factor", 5.0),
            gradient_norm_consecutive_steps=gradient.value("consecutiveSteps", int, 3),
            validation_action=validation.value("action", str, "Ignore"),
            validation_max_drop=validation.decimal("maxDrop", 0.02),
        ),
        rollback=Rollback(
            max_rollbacks=rollback.value("maxRollbacks", int, 3),
            window_seconds=rollback.value("windowSeconds", int, 86400),
            target=rollback.value("target", str, "BeforeAnomaly"),
            learning_rate_scale=rollback.decimal("learningRateScale", 1.0),
            skip_batches=rollback.value("skipBatches", str, "Anomalous"),
            on_exhausted=rollback.value("onExhausted", str, "Halt"),
            fast_deadline_milliseconds=rollback.value("fastDeadlineMilliseconds", int, 500),
            full_deadline_seconds=rollback.value("fullDeadlineSeconds", int, 12),
        ),
        restart=Restart(
            max_restarts=restart.value("maxRestarts", int, 10),
            strategy=restart.value("strategy", str, "Auto"),
            initial_backoff_seconds=restart.value("initialBackoffSeconds", int, 5),
            max_backoff_seconds=restart.value("maxBackoffSeconds", int, 300),
        ),
        profiler=_profiler(get.section("profiler")) if get.has("profiler") else None,
        faults=tuple(
            _fault(f"run.json: faultInjection[{i}]", f) for i, f in enumerate(get.value("faultInjection", list, []))
        ),
    )


def _checkpoint(section: "_Section") -> Checkpoint:
    memory = section.section("memory")
    retention = section.section("retention")
    resume = section.section("resumeFrom") if section.has("resumeFrom") else None
    return Checkpoint(
        every_steps=section.optional("everySteps", int),
        period_seconds=section.optional("periodSeconds", int),
        memory_mode=memory.value("mode", str, "Local"),
        memory_every_steps=memory.value("everySteps", int, 10),
        memory_snapshots=memory.value("snapshots", int, 3),
        memory_max_bytes=memory.value("maxBytes", int, 0),
        verification=section.value("verification", str, "Checksum"),
        retention=Retention(
            keep_latest=retention.value("keepLatest", int, 3),
            keep_best=retention.value("keepBest", int, 1),
            keep_every_steps=retention.value("keepEverySteps", int, 0),
            max_age_seconds=retention.value("maxAgeSeconds", int, 0),
            max_bytes=retention.value("maxBytes", int, 0),
            metric=retention.value("metric", str, "loss"),
            mode=retention.value("mode", str, "Min"),
        ),
        resume_from=None
        if resume is None
        else ResumeFrom(
            run_uid=resume.required("runUID", str),
            step=resume.optional("step", int),
            select=resume.value("select", str, "LatestVerified"),
        ),
    )


def _profiler(section: "_Section") -> Profiler:
    return Profiler(
        first_step=section.required("firstStep", int),
        active_steps=section.value("activeSteps", int, 10),
        every_steps=section.value("everySteps", int, 0),
        repeat=section.value("repeat", int, 1),
    )


def _fault(where: str, raw: Any) -> Fault:
    if not isinstance(raw, dict):
        raise RunConfigError(f"{where} must be an object")
    get = _Section(where, raw)
    kind = get.required("kind", str)
    if kind not in set(FaultKind):
        raise RunConfigError(f"{where}.kind is {_shown(kind)}; known are {', '.join(FaultKind)}")
    return Fault(
        kind=FaultKind(kind),
        step=get.required("step", int),
        rank=get.value("rank", int, 0),
        milliseconds=get.optional("milliseconds", int),
    )


class _Section:
    def __init__(self, where: str, raw: Mapping[str, Any]) -> None:
        self._where = where
        self._raw = raw

    def has(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def section(self, key: str) -> "_Section":
        return _Section(f"{self._where}: {key}", self.value(key, dict, {}))

    def required(self, key: str, kind: type[T]) -> T:
        found = self.optional(key, kind)
        if found is None:
            raise RunConfigError(f"{self._where}: {key} is missing")
        return found

    def value(self, key: str, kind: type[T], default: T) -> T:
        found = self.optional(key, kind)
        return default if found is None else found

    def optional(self, key: str, kind: type[T]) -> T | None:
        found = self._raw.get(key)
        if found is None:
            return None
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise RunConfigError(
                f"{self._where}: {key} is {_shown(found)}; expected {_TYPE_NAMES.get(kind, kind.__name__)}"
            )
        return found

    def decimal(self, key: str, default: float) -> float:
        """A decimal carried as a string, as the resource does."""
        text = self.value(key, str, str(default))
        try:
            number = float(text)
        except ValueError as error:
            raise RunConfigError(f"{self._where}: {key} is {_shown(text)}; expected a decimal number") from error
        if not math.isfinite(number):
            raise RunConfigError(f"{self._where}: {key} is {_shown(text)}; expected a finite decimal number")
        return number


def _shown(value: object) -> str:
    """A value as JSON, short enough for a message."""
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
