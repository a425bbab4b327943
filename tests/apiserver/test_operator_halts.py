"""Stops on a real API server: every mode, and what forged and replayed messages do: nothing."""

import base64

import pytest
from esper_leyline import labels
from esper_leyline.oona import Oona, OonaConfig
from esper_leyline.paths import EMERGENCY_SIGNAL
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType
from esper_leyline.v1.emergency_pb2 import EmergencyMode, EmergencySignal
from esper_leyline.v1.report_pb2 import RunReport, RuntimePhase

from tests.apiserver.operators import Cluster

pytestmark = [
    pytest.mark.apiserver,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

FORGER = b"a seed that the operator has not"


def moves(status: dict) -> list[str]:
    """Phases since the run first trained."""
    phases = [entry["to"] for entry in status["history"]]
    return phases[phases.index("Running") :]


async def test_a_checkpoint_halt_is_acknowledged_and_lifted(colony: Cluster) -> None:
    colony.create_run("saves", steps=40)
    await colony.stepped("saves", 5)
    await colony.phase("saves", "Running")
    colony.set_spec("saves", emergencyStop="Checkpoint")
    status = await colony.phase("saves", "Halted")
    halt = status["halt"]
    assert (halt["mode"], halt["source"], halt["acknowledged"], halt["expected"]) == ("Checkpoint", "Spec", 1, 1)
    assert (halt["savedStep"], halt.get("missing", [])) == (colony.node.training("saves").saved_step, [])
    assert halt["savedStep"] > 0
    assert moves(status) == ["Running", "Halting", "Halted"]
    colony.set_spec("saves", emergencyStop="None")
    status = await colony.phase("saves", "Succeeded")
    assert (status["attempt"], status["restarts"]["total"], status["progress"]["step"]) == (2, 0, 40)
    assert colony.node.steps_of("saves", 2) == 40 - halt["savedStep"]
    assert moves(status)[-2:] == ["Running", "Succeeded"]
    assert moves(status).count("Halted") == 1
    colony.assert_nothing_doubled("saves")


async def test_freeze_keeps_the_pod_and_goes_on_in_place(colony: Cluster) -> None:
    colony.create_run("freezes", steps=30)
    await colony.stepped("freezes", 5)
    colony.set_spec("freezes", emergencyStop="Freeze")
    status = await colony.phase("freezes", "Halted")
    assert (status["halt"]["mode"], status["halt"]["acknowledged"]) == ("Freeze", 1)
    (pod,) = colony.children("pods", "freezes")
    assert pod["status"]["phase"] == "Running"
    colony.set_spec("freezes", emergencyStop="None")
    status = await colony.phase("freezes", "Succeeded")
    assert status["attempt"] == 1
    assert [p["metadata"]["uid"] for p in colony.children("pods", "freezes")] == [pod["metadata"]["uid"]]
    assert moves(status).count("Halted") == 1
    colony.assert_nothing_doubled("freezes")


async def test_a_freeze_may_turn_into_a_kill(colony: Cluster) -> None:
    colony.create_run("dies", steps=30)
    await colony.stepped("dies", 12)
    colony.set_spec("dies", emergencyStop="Freeze")
    await colony.phase("dies", "Halted")
    saved = colony.node.training("dies").saved_step
    colony.set_spec("dies", emergencyStop="Kill")
    status = await colony.sees("dies", lambda s: s["phase"] == "Halted" and s["halt"]["mode"] == "Kill", "killed")
    assert status["halt"]["acknowledged"] == 1
    await colony.until(
        lambda: all(p["status"]["phase"] == "Failed" for p in colony.children("pods", "dies")), "the pod has ended"
    )
    assert colony.node.training("dies").saved_step == saved, "Kill saves nothing"
    (pod,) = colony.node.pod_names("dies")
    signals = [signal.mode for signal in colony.node.signals_of(pod)]
    assert signals == [EmergencyMode.EMERGENCY_MODE_FREEZE, EmergencyMode.EMERGENCY_MODE_KILL]
    colony.set_spec("dies", emergencyStop="None")
    status = await colony.phase("dies", "Succeeded")
    assert (status["attempt"], status["progress"]["step"]) == (2, 30)
    colony.assert_nothing_doubled("dies")


async def test_a_run_that_is_halted_before_it_starts_makes_no_pod(colony: Cluster) -> None:
    colony.create_run("waits", emergencyStop="Checkpoint", steps=5)
    status = await colony.phase("waits", "Halted")
    assert (status["halt"]["acknowledged"], status["halt"]["expected"]) == (0, 0)
    assert not colony.children("pods", "waits")
    assert not colony.created("jobs", "waits")
    colony.set_spec("waits", emergencyStop="None")
    assert (await colony.phase("waits", "Succeeded"))["attempt"] == 1


# --- forged and replayed ------------------------------------------------------------------------------------------


def forged_signal(uid: str) -> BusEnvelope:
    """Perfect but for the key."""
    signal = EmergencySignal(
        version=1, run_uid=uid, signal_id="f" * 32, mode=EmergencyMode.EMERGENCY_MODE_KILL, attempt=1, term=99, seq=99
    )
    key = SigningKey.derive(FORGER, uid, Role.OPERATOR)
    kind = BusMessageType.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL
    return seal(signal.SerializeToString(), kind, run_uid=uid, key=key)


def report_of(uid: str, seed: bytes, *, attempt: int = 1, seq: int = (1 << 32) + 900) -> BusEnvelope:
    report = RunReport(
        version=1, run_uid=uid, attempt=attempt, seq=seq, phase=RuntimePhase.RUNTIME_PHASE_FAILED, pod_name="no-pod"
    )
    report.failure.reason, report.failure.message = "TrainerCrashed", "never happened"
    report.counters.rollbacks = 1_000
    kind = BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT
    return seal(report.SerializeToString(), kind, run_uid=uid, key=SigningKey.derive(seed, uid, Role.REPORT))


async def test_forged_and_replayed_signals_are_ignored_counted_and_said(colony: Cluster) -> None:
    colony.create_run("victim", steps=1000)
    await colony.stepped("victim", 3)
    assert colony.redis is not None
    uid = colony.uid("victim")
    ledger = f"/api/v1/namespaces/{colony.namespace}/configmaps/{labels.emergency_config_map_name('victim')}"

    colony.set_spec("victim", emergencyStop="Freeze")
    await colony.phase("victim", "Halted")
    frozen = BusEnvelope.FromString(
        base64.b64decode(colony.plane.request("GET", ledger).body["data"][EMERGENCY_SIGNAL])
    )
    colony.set_spec("victim", emergencyStop="None")
    await colony.phase("victim", "Running")

    async with Oona(OonaConfig(url=colony.redis.url)) as intruder:
        await intruder.publish_signal(uid, forged_signal(uid))
        await intruder.publish_signal(uid, frozen)
        forged = base64.b64encode(forged_signal(uid).SerializeToString()).decode()
        assert colony.plane.merge(ledger, {"data": {EMERGENCY_SIGNAL: forged}}).ok
        (pod,) = colony.node.pod_names("victim")
        touch = {"metadata": {"annotations": {labels.SIGNAL: "99.99"}}}
        assert colony.plane.merge(f"/api/v1/namespaces/{colony.namespace}/pods/{pod}", touch).ok
        status = await colony.sees("victim", lambda s: s.get("rejections", {}).get("signals") == 3, "three rejections")
    assert status["phase"] == "Running"
    assert len(colony.node.signals_of(pod)) == 2, "the freeze and its end"
    await colony.until(lambda: colony.events("victim", "SignalRejected"), "an Event")

    # The forger has overwritten the operator's own record; the next real signal still counts.
    colony.set_spec("victim", emergencyStop="Checkpoint")
    status = await colony.phase("victim", "Halted")
    assert (status["halt"]["mode"], status["halt"]["acknowledged"]) == ("Checkpoint", 1)


async def test_forged_and_replayed_reports_are_ignored_counted_and_said(colony: Cluster) -> None:
    for name in ("target", "other"):
        colony.create_run(name, steps=1000, nan_at=3)
        await colony.stepped(name, 5)
        await colony.sees(name, lambda s: s.get("rollbacks", {}).get("total") == 1, "the rollback")
    uid, other = colony.uid("target"), colony.uid("other")
    before = colony.status("target")
    assert colony.redis is not None
    async with Oona(OonaConfig(url=colony.redis.url)) as intruder:
        old = [entry.envelope() for entry in await colony.reports_in_redis(intruder)]
        await intruder.publish_report(report_of(uid, FORGER))
        moved = report_of(other, colony.seed)  # the other run's own word, readdressed
        moved.run_uid = uid
        await intruder.publish_report(moved)
        for envelope in old:
            assert envelope is not None
            await intruder.publish_report(envelope)
        await intruder.publish_report(BusEnvelope(run_uid=uid, payload=b"\xff"))

    def counted(outcome: str) -> float:
        return colony.operator.metric("esper_reports_total", outcome=outcome)

    await colony.until(lambda: counted("malformed") >= 2 and counted("forged") >= 1, "the counters")
    assert counted("repeated") > 0
    await colony.until(lambda: colony.events("target", "ReportRejected"), "an Event")
    (event,) = colony.events("target", "ReportRejected")
    assert "invalid_signature" in event["note"] or "unknown_key_id" in event["note"]
    status = colony.status("target")
    assert status["history"] == before["history"]
    assert (status["rollbacks"]["total"], status["phase"]) == (1, "Running")
    assert status.get("lastFailure") is None
    assert not colony.events("target", "TrainerCrashed")
