"""Names that several parts share: unique, well-formed, and the same in Python, in the messages and in the CRD."""

import re
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import celpy
import pytest
import yaml
from esper_leyline import env, exitcodes, labels, paths, phases, ports, reasons
from esper_leyline.v1 import emergency_pb2, report_pb2

ROOT = Path(__file__).resolve().parents[3]
CRD = yaml.safe_load((ROOT / "crds/espertrainingruns.yaml").read_text())
SPEC = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
STATUS = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]

BY_SUPERVISOR = {
    env.INCARNATION,
    env.TRAINER_START,
    env.RECOVERY_CAUSE,
    env.RECOVERY_DETECTED_NS,
    env.RECOVERY_STEP,
    env.RECOVERY_INCIDENT,
}


def constants(module: ModuleType) -> dict[str, str]:
    return {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, str)}


def allows(schema: dict[str, Any], value: Any) -> bool:
    """Whether every CEL rule of `schema` holds for `value`, as the API server would say."""
    environment = celpy.Environment()
    rules = [rule["rule"] for rule in schema["x-kubernetes-validations"]]
    programs = [environment.program(environment.compile(rule)) for rule in rules]
    return all(bool(program.evaluate({"self": celpy.json_to_cel(value)})) for program in programs)


# --- environment ---------------------------------------------------------------------------------------------


def test_environment_names_are_ours_and_unique() -> None:
    names = constants(env)
    assert all(value.startswith("ESPER_") for value in names.values())
    assert len(set(names.values())) == len(names)


def test_everything_that_the_operator_sets_is_reserved() -> None:
    assert set(constants(env).values()) - BY_SUPERVISOR == {name for name in env.RESERVED if name.startswith("ESPER_")}


VARIABLE = SPEC["runtime"]["properties"]["env"]["items"]


@pytest.mark.parametrize("name", sorted(env.RESERVED | BY_SUPERVISOR | {"ESPER_", "ESPER_ANYTHING"}))
def test_the_crd_refuses_reserved_variables(name: str) -> None:
    assert not allows(VARIABLE, {"name": name, "value": "x"})


@pytest.mark.parametrize("name", ["PATH", "MASTER", "RANKS", "MY_ESPER_X", "OMP_NUM_THREADS", "esper_x"])
def test_the_crd_takes_other_variables(name: str) -> None:
    assert allows(VARIABLE, {"name": name, "value": "x"})


# --- labels and kinds ----------------------------------------------------------------------------------------


def test_the_crd_is_called_what_labels_say() -> None:
    names = CRD["spec"]["names"]
    assert CRD["metadata"]["name"] == f"{labels.PLURAL}.{labels.GROUP}"
    assert CRD["spec"]["group"] == labels.GROUP
    assert CRD["spec"]["versions"][0]["name"] == labels.VERSION
    assert (names["kind"], names["plural"], names["singular"]) == (labels.KIND, labels.PLURAL, labels.SINGULAR)
    assert tuple(names["shortNames"]) == labels.SHORT_NAMES
    assert f"{labels.GROUP}/{labels.VERSION}" == labels.API_VERSION


OURS = [labels.RUN, labels.RUN_UID, labels.ATTEMPT, labels.COMPONENT, labels.NAME, labels.MANAGED]


@pytest.mark.parametrize("key", [*OURS, labels.COMPLETION_INDEX, labels.QUEUE_NAME, "job-name"])
def test_the_crd_refuses_labels_that_select_pods(key: str) -> None:
    assert not allows(SPEC["workers"]["properties"]["pod"]["properties"]["labels"], {key: "x"})


@pytest.mark.parametrize("key", [labels.CONFIG_HASH, labels.SIGNAL, labels.DEFAULT_CONTAINER])
def test_the_crd_refuses_annotations_that_mean_something_to_us(key: str) -> None:
    assert not allows(SPEC["workers"]["properties"]["pod"]["properties"]["annotations"], {key: "x"})


def test_the_crd_takes_a_users_own_labels() -> None:
    assert allows(SPEC["workers"]["properties"]["pod"]["properties"]["labels"], {"team": "vision", "acme.io/x": "y"})


def test_children_of_two_runs_never_share_a_name() -> None:
    makers = [
        labels.config_map_name,
        labels.emergency_config_map_name,
        labels.keys_secret_name,
        labels.bus_secret_name,
        labels.claim_name,
    ]
    assert len({make("a") for make in makers}) == len(makers)
    assert labels.job_name("a", 1) != labels.job_name("a", 11)


# --- enumerations --------------------------------------------------------------------------------------------


def of_wire(enum: Any, prefix: str) -> set[str]:
    """CamelCase names of a proto enum's values but the unspecified one."""
    words = (name.removeprefix(prefix).split("_") for name in enum.keys() if not name.endswith("_UNSPECIFIED"))  # noqa: SIM118 - an EnumTypeWrapper is no dict
    return {"".join(word.capitalize() for word in parts) for parts in words}


@pytest.mark.parametrize(
    ("here", "wire", "prefix", "only_here"),
    [
        (phases.EmergencyStop, emergency_pb2.EmergencyMode, "EMERGENCY_MODE_", {"None"}),
        (phases.HaltSource, emergency_pb2.EmergencySource, "EMERGENCY_SOURCE_", set()),
        (phases.RecoveryKind, report_pb2.RecoveryKind, "RECOVERY_KIND_", set()),
    ],
)
def test_the_resource_and_the_wire_have_the_same_words(
    here: type[StrEnum], wire: Any, prefix: str, only_here: set[str]
) -> None:
    assert set(here) == of_wire(wire, prefix) | only_here


@pytest.mark.parametrize(
    ("here", "schema"),
    [
        (phases.EmergencyStop, SPEC["emergencyStop"]),
        (phases.FaultKind, SPEC["faultInjection"]["items"]["properties"]["kind"]),
        (phases.RecoveryKind, STATUS["lastRecovery"]["properties"]["kind"]),
        (phases.HaltSource, STATUS["halt"]["properties"]["source"]),
    ],
)
def test_the_resource_and_the_crd_have_the_same_words(here: type[StrEnum], schema: dict[str, Any]) -> None:
    assert set(here) == set(schema["enum"])


@pytest.mark.parametrize("enum", [reasons.RunReason, phases.ConditionType, phases.Phase])
def test_reasons_are_what_kubernetes_takes_and_unique(enum: type[StrEnum]) -> None:
    assert all(re.fullmatch(r"[A-Z][A-Za-z0-9]{1,63}", value) for value in enum)
    assert len({value.name for value in enum}) == len(enum.__members__)


@pytest.mark.parametrize("enum", [reasons.CommandRejection, reasons.SignalRejection])
def test_rejections_name_what_a_signature_check_says(enum: type[StrEnum]) -> None:
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", value) for value in enum)
    assert {"missing_signature", "unknown_key_id", "invalid_signature"} <= set(enum)


def test_reasons_of_the_resource_are_bounded_as_the_crd_says() -> None:
    assert max(map(len, reasons.RunReason)) <= STATUS["history"]["items"]["properties"]["reason"]["maxLength"]


# --- numbers and places --------------------------------------------------------------------------------------


def test_exit_codes_are_distinct_and_apart_from_the_shells() -> None:
    codes = list(exitcodes.ExitCode.__members__.values())
    assert len(set(map(int, codes))) == len(codes)
    assert all(code in (0, 143) or 64 <= code < 126 for code in codes)


def test_ports_are_distinct() -> None:
    numbers = [value for name, value in vars(ports).items() if name.isupper() and isinstance(value, int)]
    assert len(set(numbers)) == len(numbers)


def test_users_are_distinct_and_not_root() -> None:
    uids = [*paths.UIDS.values(), paths.OPERATOR_UID, paths.GID]
    assert len(set(uids)) == len(uids)
    assert min(uids) >= 10000
    assert set(paths.UIDS) == {labels.TOLARIA, *labels.SIDECARS}


def test_sockets_fit_into_a_unix_address_with_room_for_a_laptops_folder() -> None:
    sockets = (paths.WEATHERLIGHT_SOCKET, paths.KASMINA_SOCKET, paths.TAMIYO_SOCKET)
    assert all(len(f"{paths.POD.run}/{name}") <= 107 - 60 for name in sockets)


def test_attempts_sort_by_name() -> None:
    names = [paths.attempt_dir("uid", attempt) for attempt in (1, 2, 10, 99999)]
    assert names == sorted(names)
    assert names[0] == "uid/a00001"
