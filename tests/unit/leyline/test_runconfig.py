"""run.json: what the operator renders, the runtime reads; what is wrong is named."""

import json
from typing import Any

import pytest
from esper_leyline.phases import FaultKind
from esper_leyline.runconfig import (
    Checkpoint,
    Fault,
    Health,
    Profiler,
    Restart,
    ResumeFrom,
    Retention,
    Rollback,
    RunConfig,
    RunConfigError,
    parse,
    render,
)

FULL_SPEC: dict[str, Any] = {
    "runtime": {
        "entrypoint": "a.b:build",
        "config": {"width": 64, "nested": {"x": [1, 2.5, None, "ü"]}},
        "profiler": {"firstStep": 20, "activeSteps": 5, "everySteps": 100, "repeat": 2},
    },
    "workers": {"count": 2},
    "checkpoint": {
        "storage": {"size": "1Gi"},
        "everySteps": 100,
        "periodSeconds": 60,
        "memory": {"mode": "Off", "everySteps": 7, "snapshots": 4, "maxBytes": 1000},
        "verification": "Full",
        "retention": {
            "keepLatest": 5,
            "keepBest": 2,
            "keepEverySteps": 1000,
            "maxAgeSeconds": 60,
            "maxBytes": 9000,
            "metric": "accuracy",
            "mode": "Max",
        },
        "resumeFrom": {"runName": "earlier", "step": 12, "select": "Best"},
    },
    "health": {
        "heartbeatTimeoutSeconds": 10,
        "progressTimeoutSeconds": 20,
        "nonFiniteAction": "Halt",
        "lossSpike": {"action": "Ignore", "windowSteps": 9, "threshold": "4.5", "consecutiveSteps": 2},
        "gradientNorm": {"action": "Halt", "factor": "7.5", "consecutiveSteps": 4},
        "validation": {"action": "Rollback", "maxDrop": "0.1"},
    },
    "rollback": {
        "maxRollbacks": 1,
        "windowSeconds": 30,
        "target": "LastGood",
        "learningRateScale": "0.5",
        "skipBatches": "None",
        "onExhausted": "Fail",
        "fastDeadlineMilliseconds": 250,
        "fullDeadlineSeconds": 5,
    },
    "restart": {
        "maxRestarts": 4,
        "strategy": "Never",
        "initialBackoffSeconds": 1,
        "maxBackoffSeconds": 2,
        "activeDeadlineSeconds": 3,
    },
    "faultInjection": [{"kind": "Hang", "step": 5}, {"kind": "SlowStep", "step": 6, "rank": 1, "milliseconds": 50}],
}
FULL = RunConfig(
    name="digits",
    namespace="ml",
    uid="uid-1",
    entrypoint="a.b:build",
    config={"width": 64, "nested": {"x": [1, 2.5, None, "ü"]}},
    world_size=2,
    checkpoint=Checkpoint(
        every_steps=100,
        period_seconds=60,
        memory_mode="Off",
        memory_every_steps=7,
        memory_snapshots=4,
        memory_max_bytes=1000,
        verification="Full",
        retention=Retention(
            keep_latest=5,
            keep_best=2,
            keep_every_steps=1000,
            max_age_seconds=60,
            max_bytes=9000,
            metric="accuracy",
            mode="Max",
        ),
        resume_from=ResumeFrom(run_uid="uid-0", step=12, select="Best"),
    ),
    health=Health(
        heartbeat_timeout_seconds=10,
        progress_timeout_seconds=20,
        non_finite_action="Halt",
        loss_spike_action="Ignore",
        loss_spike_window_steps=9,
        loss_spike_threshold=4.5,
        loss_spike_consecutive_steps=2,
        gradient_norm_action="Halt",
        gradient_norm_factor=7.5,
        gradient_norm_consecutive_steps=4,
        validation_action="Rollback",
        validation_max_drop=0.1,
    ),
    rollback=Rollback(
        max_rollbacks=1,
        window_seconds=30,
        target="LastGood",
        learning_rate_scale=0.5,
        skip_batches="None",
        on_exhausted="Fail",
        fast_deadline_milliseconds=250,
        full_deadline_seconds=5,
    ),
    restart=Restart(max_restarts=4, strategy="Never", initial_backoff_seconds=1, max_backoff_seconds=2),
    profiler=Profiler(first_step=20, active_steps=5, every_steps=100, repeat=2),
    faults=(Fault(kind=FaultKind.HANG, step=5), Fault(kind=FaultKind.SLOW_STEP, step=6, rank=1, milliseconds=50)),
)
MINIMAL_SPEC = {"runtime": {"entrypoint": "a.b:build"}, "checkpoint": {"everySteps": 10}}


def rendered(spec: dict[str, Any] = FULL_SPEC, resume_uid: str | None = "uid-0") -> str:
    return render(name="digits", namespace="ml", uid="uid-1", spec=spec, resume_uid=resume_uid)


def test_everything_that_is_rendered_is_read_back() -> None:
    assert parse(rendered()) == FULL


def test_no_default_hides_in_the_full_example() -> None:
    """Else the round trip above could pass without the key being read."""
    bare = RunConfig(name="digits", namespace="ml", uid="uid-1", entrypoint="a.b:build")
    for part in ("checkpoint", "health", "rollback", "restart"):
        full, default = getattr(FULL, part), getattr(bare, part)
        same = [name for name in full.__slots__ if getattr(full, name) == getattr(default, name)]
        assert same == []


def test_a_minimal_spec_gets_the_defaults() -> None:
    assert parse(rendered(MINIMAL_SPEC, None)) == RunConfig(
        name="digits", namespace="ml", uid="uid-1", entrypoint="a.b:build", checkpoint=Checkpoint(every_steps=10)
    )


def test_equal_runs_give_equal_bytes() -> None:
    backwards = {key: FULL_SPEC[key] for key in reversed(FULL_SPEC)}
    assert rendered(backwards) == rendered()
    assert rendered().endswith("}\n")


def test_the_runtime_is_told_no_more_than_it_uses() -> None:
    document = json.loads(rendered())
    assert "storage" not in document["checkpoint"]
    assert "runName" not in document["checkpoint"]["resumeFrom"]
    assert "activeDeadlineSeconds" not in document["restart"]


def test_a_resume_source_that_was_not_looked_up_is_left_out() -> None:
    assert parse(rendered(resume_uid=None)).checkpoint.resume_from is None


def test_unknown_keys_of_a_newer_operator_are_ignored() -> None:
    document = json.loads(rendered())
    document["surprise"] = {"a": 1}
    document["health"]["surprise"] = []
    assert parse(json.dumps(document)) == FULL


def test_a_number_that_json_cannot_carry_is_not_rendered() -> None:
    spec = MINIMAL_SPEC | {"runtime": {"entrypoint": "a.b:build", "config": {"x": float("nan")}}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        rendered(spec, None)


@pytest.mark.parametrize("version", [None, 0, 2, "1", True, 1.0])
def test_another_version_is_refused_with_a_remedy(version: object) -> None:
    document = json.loads(rendered()) | {"version": version}
    with pytest.raises(RunConfigError, match=r"run.json has version .*: use an operator and a runtime image"):
        parse(json.dumps(document))


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "run.json is no JSON: "), ("", "run.json is no JSON: "), ("[]", "run.json must hold an object")],
)
def test_what_is_no_object_is_refused(text: str, words: str) -> None:
    with pytest.raises(RunConfigError, match=words):
        parse(text)


@pytest.mark.parametrize("key", ["name", "namespace", "uid", "entrypoint"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_missing_key_is_named(key: str, how: str) -> None:
    document = json.loads(rendered())
    document[key] = None
    if how == "absent":
        del document[key]
    with pytest.raises(RunConfigError, match=f"^run.json: {key} is missing$"):
        parse(json.dumps(document))


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of every key that the reader looks at; what is inside the user's `config` is his own."""
    if path == ("config",):
        return [path]
    if isinstance(value, dict):
        return [found for key in value for found in ([(*path, key)] if path != () or key != "version" else [])] + [
            found
            for key, inner in value.items()
            if isinstance(inner, dict | list)
            for found in leaves(inner, (*path, key))
        ]
    return [found for index, inner in enumerate(value) for found in [(*path, index), *leaves(inner, (*path, index))]]


DOCUMENT = json.loads(rendered())
PATHS = sorted(set(leaves(DOCUMENT)), key=str)


def replaced(path: tuple[str | int, ...], value: Any) -> str:
    document = json.loads(rendered())
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_every_wrong_type_names_its_key(path: tuple[str | int, ...]) -> None:
    place: Any = DOCUMENT
    for key in path:
        place = place[key]
    wrong = [value for value in ("x", 1.5, True, [1], {"a": 1}, 7) if type(value) is not type(place)]
    for value in wrong:
        with pytest.raises(RunConfigError) as caught:
            parse(replaced(path, value))
        named = [str(key) for key in path]
        assert all(name in str(caught.value) for name in named), str(caught.value)
        assert str(caught.value).startswith("run.json: ")


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-Infinity", "1,5"])
@pytest.mark.parametrize("path", [("rollback", "learningRateScale"), ("health", "lossSpike", "threshold")])
def test_a_decimal_must_be_a_finite_number(path: tuple[str, ...], text: str) -> None:
    with pytest.raises(RunConfigError, match=rf"{path[-1]} is .*; expected a (finite )?decimal number"):
        parse(replaced(path, text))


def test_a_fault_of_an_unknown_kind_is_named_with_the_known_ones() -> None:
    with pytest.raises(RunConfigError, match=r'faultInjection\[1\].kind is "Flood"; known are NonFiniteLoss, '):
        parse(replaced(("faultInjection", 1, "kind"), "Flood"))


def test_a_giant_value_does_not_make_a_giant_message() -> None:
    with pytest.raises(RunConfigError) as caught:
        parse(replaced(("worldSize",), "9" * 100_000))
    assert len(str(caught.value)) < 200
