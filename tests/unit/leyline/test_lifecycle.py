"""Every pair of stages, with its gate or none; and who may tell of it."""

import itertools

import pytest
from esper_leyline import contracts
from esper_leyline.lifecycle import FREE, GATES, TransitionError, gate_of
from esper_leyline.v1.seed_pb2 import GateEvent, GateVerdict, SeedLifecycleGate, SeedLifecycleStage

STAGES = {
    name.removeprefix("SEED_LIFECYCLE_STAGE_"): number for name, number in dict(SeedLifecycleStage.items()).items()
}
LEGAL = {
    "UNSPECIFIED": {"DORMANT": ""},
    "DORMANT": {"GERMINATED": "G0", "TERMINATED": ""},
    "GERMINATED": {"TRAINING": "G0", "CULLED": ""},
    "TRAINING": {"BLENDING": "G1", "CULLED": ""},
    "BLENDING": {"SHADOWING": "G2", "CULLED": ""},
    "SHADOWING": {"PROBATIONARY": "G3", "CULLED": ""},
    "PROBATIONARY": {"FOSSILIZED": "G4", "CULLED": ""},
    "FOSSILIZED": {"TERMINATED": ""},
    "CULLED": {"EMBARGOED": ""},
    "EMBARGOED": {"RESETTING": ""},
    "RESETTING": {"DORMANT": "G5"},
    "TERMINATED": {},
}


@pytest.mark.row("T32")
def test_of_144_pairs_of_stages_17_are_steps_each_with_its_gate() -> None:
    found: dict[str, dict[str, str]] = {name: {} for name in STAGES}
    for before, after in itertools.product(STAGES, repeat=2):
        try:
            gate = gate_of(STAGES[before], STAGES[after])  # type: ignore[arg-type]
        except TransitionError as error:
            assert str(error) == f"no seed goes from {before} to {after}"  # noqa: PT017 - most pairs raise
            continue
        found[before][after] = "" if gate is None else SeedLifecycleGate.Name(gate).split("_")[3]
    assert found == LEGAL
    assert len(GATES) + len(FREE) == sum(map(len, LEGAL.values())) == 17


@pytest.mark.row("T32")
def test_every_gate_guards_a_step() -> None:
    guarding = {SeedLifecycleGate.Name(gate) for gate in GATES.values()}
    assert guarding == {name for name in SeedLifecycleGate.keys() if not name.endswith("UNSPECIFIED")}  # noqa: SIM118


def test_a_stage_of_a_later_version_is_no_step() -> None:
    with pytest.raises(TransitionError, match="from TRAINING to 99"):
        gate_of(STAGES["TRAINING"], 99)  # type: ignore[arg-type]


@pytest.mark.row("T32")
@pytest.mark.parametrize("verdict", ["PASS", "HOLD", "FAIL"])
def test_what_a_gate_says_keeps_its_contract_over_the_wire(verdict: str) -> None:
    event = GateEvent(
        gate=SeedLifecycleGate.SEED_LIFECYCLE_GATE_G2_STABILITY,
        seed_id="conv1",
        from_stage=STAGES["BLENDING"],  # type: ignore[arg-type]
        to_stage=STAGES["SHADOWING"],  # type: ignore[arg-type]
        verdict=GateVerdict.Value(f"GATE_VERDICT_{verdict}"),
        reason="output drift 0.02",
    )
    again = GateEvent.FromString(event.SerializeToString())
    contracts.check(again)
    assert again == event
