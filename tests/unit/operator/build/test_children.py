"""The objects besides the Job: names, owners, content, and what is written once only."""

import base64
import dataclasses
import json
from typing import Any

import kubernetes_validate
import pytest
from esper_leyline import labels, paths, runconfig, signing
from esper_leyline.signing import Role, SigningKey, Verifier
from esper_leyline.v1.common_pb2 import BusMessageType
from esper_operator import build
from esper_operator.model import Child, Settings

from tests.support import specs

VERSION = "1.34"


def children(spec: dict[str, Any] | None = None, settings: Settings = specs.SETTINGS) -> dict[str, Child]:
    found = build.children(specs.run(spec), settings)
    return {f"{c.manifest['kind']} {c.manifest['metadata']['name']}": c for c in found}


def content(child: Child) -> dict[str, str]:
    data = child.manifest["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def test_a_run_owns_these_objects() -> None:
    assert {name: child.create_only for name, child in children().items()} == {
        "Secret run-keys": True,
        "Secret run-bus": False,
        "ConfigMap run-config": False,
        "ConfigMap run-emergency": True,
        "PersistentVolumeClaim run-checkpoints": True,
        "Service run": False,
    }


@pytest.mark.parametrize("make", [specs.minimal, specs.buildable])
def test_every_object_is_valid_kubernetes(make: Any) -> None:
    for child in build.children(specs.run(make()), specs.SETTINGS):
        kubernetes_validate.validate(child.manifest, VERSION, strict=True)


def test_every_object_is_labelled_and_owned_by_the_run() -> None:
    for name, child in children().items():
        metadata = child.manifest["metadata"]
        assert metadata["namespace"] == "team"
        assert metadata["labels"][labels.RUN] == "run"
        assert metadata["labels"][labels.RUN_UID] == specs.UID
        if not name.startswith("PersistentVolumeClaim"):
            (owner,) = metadata["ownerReferences"]
            assert owner["uid"] == specs.UID
            assert owner["controller"] is owner["blockOwnerDeletion"] is True


@pytest.mark.parametrize(("when_deleted", "owned"), [("Retain", False), ("Delete", True)])
def test_the_claim_outlives_the_run_unless_told_otherwise(when_deleted: str, owned: bool) -> None:
    template = {"size": "5Gi", "storageClassName": "fast", "whenDeleted": when_deleted}
    spec = specs.with_patch({"checkpoint": {"storage": {"claimTemplate": template}}})
    claim = children(spec)["PersistentVolumeClaim run-checkpoints"].manifest
    assert ("ownerReferences" in claim["metadata"]) is owned
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "fast",
    }


def test_a_claim_of_the_users_is_left_alone() -> None:
    spec = specs.with_patch({"checkpoint": {"storage": {"claimTemplate": None, "claimName": "mine"}}})
    assert not any(name.startswith("PersistentVolumeClaim") for name in children(spec))


def test_keys_are_the_operators_and_fit_each_other() -> None:
    keys = content(children()["Secret run-keys"])
    assert set(keys) == {item for items in signing.KEY_ITEMS.values() for item in items}
    report = SigningKey.from_text(keys[signing.REPORT_PRIVATE])
    assert report.key_id == SigningKey.derive(specs.SEED, specs.UID, Role.REPORT).key_id
    operator = SigningKey.derive(specs.SEED, specs.UID, Role.OPERATOR)
    envelope = signing.seal(b"x", BusMessageType.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL, run_uid=specs.UID, key=operator)
    Verifier.from_text(keys[signing.OPERATOR_PUBLIC]).check_envelope(envelope)
    tamiyo = SigningKey.from_text(keys[signing.TAMIYO_PRIVATE])
    following = SigningKey.derive(specs.SEED, specs.UID, Role.TAMIYO, 2)
    assert keys[signing.TAMIYO_PUBLIC] == tamiyo.public_text() + following.public_text()


def test_keys_are_the_same_each_time_and_differ_between_runs() -> None:
    first, again = children()["Secret run-keys"], children()["Secret run-keys"]
    assert first == again
    other = specs.SETTINGS.__class__(runtime_image="r", sidecar_image="s", key_seed=bytes(32))
    assert content(children(settings=other)["Secret run-keys"]) != content(first)


def test_a_short_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        build.children(specs.run(), Settings(runtime_image="r", sidecar_image="s", key_seed=b"short"))


def test_the_way_to_redis_holds_what_is_given_and_no_more() -> None:
    assert content(children()["Secret run-bus"]) == {
        paths.BUS_URL: "redis://valkey.esper-system:6379/0",
        paths.BUS_USERNAME: "pods",
        paths.BUS_PASSWORD: "open sesame",
    }


def test_with_users_per_run_the_way_to_redis_opens_this_run_s_part_alone() -> None:
    settings = dataclasses.replace(specs.SETTINGS, bus_per_run_users=True)
    found = content(children(settings=settings)["Secret run-bus"])
    assert found == {
        paths.BUS_URL: "redis://valkey.esper-system:6379/0",
        paths.BUS_USERNAME: f"run-{specs.UID}",
        paths.BUS_PASSWORD: signing.bus_password(specs.SEED, specs.UID),
    }
    assert specs.SETTINGS.bus_password not in found.values()


def test_without_redis_there_is_no_way_to_it() -> None:
    settings = Settings(runtime_image="r", sidecar_image="s", key_seed=specs.SEED)
    assert "Secret run-bus" not in children(settings=settings)


def test_secrets_never_show_in_a_repr() -> None:
    assert "open sesame" not in repr(specs.SETTINGS)
    assert repr(specs.SEED) not in repr(specs.SETTINGS)


def test_the_runtime_reads_what_the_operator_writes() -> None:
    (config,) = [c for c in build.children(specs.run(specs.buildable()), specs.SETTINGS, "earlier-uid")
                 if c.manifest["metadata"]["name"] == "run-config"]  # fmt: skip
    found = runconfig.parse(config.manifest["data"][paths.RUN_CONFIG])
    assert (found.name, found.namespace, found.uid) == ("run", "team", specs.UID)
    assert found.entrypoint == "package.module:build"
    assert found.config == {"epochs": 3, "layers": [1, 2], "nested": {"deep": None}}
    assert found.checkpoint.every_steps == 100
    assert found.checkpoint.resume_from is not None
    assert found.checkpoint.resume_from.run_uid == "earlier-uid"
    assert found.health.loss_spike_threshold == 4.5
    assert found.rollback.learning_rate_scale == 0.5
    assert found.restart.strategy == "Recreate"
    assert found.faults[0].milliseconds == 50


def test_a_source_to_resume_from_that_nobody_asked_for_is_ignored() -> None:
    config = build.children(specs.run(), specs.SETTINGS, "some-uid")[2].manifest
    assert "resumeFrom" not in json.loads(config["data"][paths.RUN_CONFIG])["checkpoint"]


def test_the_config_hash_follows_what_the_runtime_reads_and_nothing_else() -> None:
    def hash_of(patch: dict[str, Any]) -> str:
        config = children(specs.with_patch(patch))["ConfigMap run-config"].manifest
        return str(config["metadata"]["annotations"][labels.CONFIG_HASH])

    assert hash_of({}) == hash_of({"suspend": True}) == hash_of({"emergencyStop": "Freeze"})
    assert hash_of({}) != hash_of({"health": {"nonFiniteAction": "Halt"}})


def test_the_pod_starts_with_the_hash_of_its_config() -> None:
    run = specs.run(specs.buildable())
    config = build.children(run, specs.SETTINGS, "earlier-uid")[2].manifest
    template = build.job(run, 1, specs.SETTINGS)["spec"]["template"]
    assert (
        template["metadata"]["annotations"][labels.CONFIG_HASH] == config["metadata"]["annotations"][labels.CONFIG_HASH]
    )


def test_the_emergency_record_begins_empty_and_is_never_overwritten() -> None:
    child = children()["ConfigMap run-emergency"]
    assert "data" not in child.manifest
    assert child.create_only


def test_names_of_pods_resolve_before_they_are_ready() -> None:
    service = children()["Service run"].manifest["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    assert service["selector"] == {labels.RUN_UID: specs.UID}


def test_building_twice_gives_the_same() -> None:
    assert build.children(specs.run(specs.buildable()), specs.SETTINGS) == build.children(
        specs.run(specs.buildable()), specs.SETTINGS
    )
