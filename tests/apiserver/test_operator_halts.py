"""Stops on a real API server: every mode, with and without Redis, and what forged and replayed messages do: nothing."""

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

pytestmark = [pytest.mark.apiserver, pytest.mark.slow, pytest.mark.timeout(300)]

PODS = "/api/v1/namespaces/{}/pods"
FORGER = b"a seed that the operator has not"


def moves(status: dict) -> list[str]:
    """Phases since the run first trained."""
    phases = [entry["to"] for entry in status["history"]]
    return phases[phases.index("Running") :]


@pytest.mark.parametrize("way", ["redis", "redis-killed", "without-redis"])
async def test_a_checkpoint_halt_is_acknowledged_and_lifted(place: Cluster, way: str) -> None:
    operator = place.start_operator(**({"bus_url": ""} if way == "without-redis" else {}))
    place.create_run("digits", steps=60)
    await place.stepped("digits", 5)
    if way == "redis-killed":
        assert place.redis is not None
        place.redis.kill()
    if way != "redis":
        await place.until(lambda: operator.metric("esper_reports_total", way="pull", outcome="accepted"), "pulled")
    await place.phase("digits", "Running")
    place.set_spec("digits", emergencyStop="Checkpoint")
    status = await place.phase("digits", "Halted")
    halt = status["halt"]
    assert (halt["mode"], halt["source"], halt["acknowledged"], halt["expected"]) == ("Checkpoint", "Spec", 1, 1)
    assert (halt["savedStep"], halt.get("missing", [])) == (place.node.training("digits").saved_step, [])
    assert halt["savedStep"] > 0
    assert moves(status) == ["Running", "Halting", "Halted"]
    print(f"\nhalt acknowledged, {way}: {halt['milliseconds']} ms")
    place.set_spec("digits", emergencyStop="None")
    status = await place.phase("digits", "Succeeded")
    assert (status["attempt"], status["restarts"]["total"], status["progress"]["step"]) == (2, 0, 60)
    assert moves(status)[-2:] == ["Running", "Succeeded"]
    assert moves(status).count("Halted") == 1
    place.assert_nothing_doubled("digits")


async def test_freeze_keeps_the_pod_and_goes_on_in_place(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=40)
    await place.stepped("digits", 5)
    place.set_spec("digits", emergencyStop="Freeze")
    status = await place.phase("digits", "Halted")
    assert (status["halt"]["mode"], status["halt"]["acknowledged"]) == ("Freeze", 1)
    (pod,) = place.items(PODS)
    assert pod["status"]["phase"] == "Running"
    place.set_spec("digits", emergencyStop="None")
    status = await place.phase("digits", "Succeeded")
    assert status["attempt"] == 1
    assert [p["metadata"]["uid"] for p in place.items(PODS)] == [pod["metadata"]["uid"]]
    assert moves(status).count("Halted") == 1
    place.assert_nothing_doubled("digits")


async def test_a_freeze_may_turn_into_a_kill(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=40)
    await place.stepped("digits", 12)
    place.set_spec("digits", emergencyStop="Freeze")
    await place.phase("digits", "Halted")
    saved = place.node.training("digits").saved_step
    place.set_spec("digits", emergencyStop="Kill")
    status = await place.sees("digits", lambda s: s["phase"] == "Halted" and s["halt"]["mode"] == "Kill", "killed")
    assert status["halt"]["acknowledged"] == 1
    await place.until(lambda: all(p["status"]["phase"] == "Failed" for p in place.items(PODS)), "the pod has ended")
    assert place.node.training("digits").saved_step == saved, "Kill saves nothing"
    signals = [signal.mode for signal in place.node.signals_seen]
    assert signals == [EmergencyMode.EMERGENCY_MODE_FREEZE, EmergencyMode.EMERGENCY_MODE_KILL]
    place.set_spec("digits", emergencyStop="None")
    status = await place.phase("digits", "Succeeded")
    assert (status["attempt"], status["progress"]["step"]) == (2, 40)
    place.assert_nothing_doubled("digits")


async def test_a_run_that_is_halted_before_it_starts_makes_no_pod(place: Cluster) -> None:
    await place.leading_operator()
    place.create_run("digits", emergencyStop="Checkpoint")
    status = await place.phase("digits", "Halted")
    assert (status["halt"]["acknowledged"], status["halt"]["expected"]) == (0, 0)
    assert not place.items(PODS)
    assert not place.created("jobs", "digits")
    place.set_spec("digits", emergencyStop="None")
    assert (await place.phase("digits", "Succeeded"))["attempt"] == 1


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


async def test_forged_and_replayed_signals_are_ignored_counted_and_said(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=1000)
    await place.stepped("digits", 3)
    assert place.redis is not None
    uid = place.plane.request("GET", place.path("digits")).body["metadata"]["uid"]
    ledger = f"/api/v1/namespaces/{place.namespace}/configmaps/{labels.emergency_config_map_name('digits')}"

    place.set_spec("digits", emergencyStop="Freeze")
    await place.phase("digits", "Halted")
    frozen = BusEnvelope.FromString(base64.b64decode(place.plane.request("GET", ledger).body["data"][EMERGENCY_SIGNAL]))
    place.set_spec("digits", emergencyStop="None")
    await place.phase("digits", "Running")

    async with Oona(OonaConfig(url=place.redis.url)) as intruder:
        await intruder.publish_signal(uid, forged_signal(uid))
        await intruder.publish_signal(uid, frozen)
        forged = base64.b64encode(forged_signal(uid).SerializeToString()).decode()
        assert place.plane.merge(ledger, {"data": {EMERGENCY_SIGNAL: forged}}).ok
        (pod,) = place.node.pod_names("digits")
        touch = {"metadata": {"annotations": {labels.SIGNAL: "99.99"}}}
        assert place.plane.merge(f"{PODS.format(place.namespace)}/{pod}", touch).ok
        status = await place.sees("digits", lambda s: s.get("rejections", {}).get("signals") == 3, "three rejections")
    assert status["phase"] == "Running"
    assert len(place.node.signals_of(pod)) == 2, "the freeze and its end"
    await place.until(lambda: place.events("digits", "SignalRejected"), "an Event")

    # The forger has overwritten the operator's own record; the next real signal still counts.
    place.set_spec("digits", emergencyStop="Checkpoint")
    status = await place.phase("digits", "Halted")
    assert (status["halt"]["mode"], status["halt"]["acknowledged"]) == ("Checkpoint", 1)


async def test_forged_and_replayed_reports_are_ignored_counted_and_said(place: Cluster) -> None:
    operator = place.start_operator()
    for name in ("digits", "other"):
        place.create_run(name, steps=1000, nan_at=3)
        await place.stepped(name, 5)
        await place.sees(name, lambda s: s.get("rollbacks", {}).get("total") == 1, "the rollback")
    uid, other = (place.plane.request("GET", place.path(n)).body["metadata"]["uid"] for n in ("digits", "other"))
    before = place.status("digits")
    assert place.redis is not None
    async with Oona(OonaConfig(url=place.redis.url)) as intruder:
        old = [entry.envelope() for entry in await place.reports_in_redis(intruder)]
        await intruder.publish_report(report_of(uid, FORGER))
        moved = report_of(other, place.seed)  # the other run's own word, readdressed
        moved.run_uid = uid
        await intruder.publish_report(moved)
        for envelope in old:
            assert envelope is not None
            await intruder.publish_report(envelope)
        await intruder.publish_report(BusEnvelope(run_uid=uid, payload=b"\xff"))

    def counted(outcome: str) -> float:
        return operator.metric("esper_reports_total", outcome=outcome)

    await place.until(lambda: counted("malformed") >= 2 and counted("forged") >= 1, "the counters")
    assert counted("repeated") > 0
    await place.until(lambda: place.events("digits", "ReportRejected"), "an Event")
    (event,) = place.events("digits", "ReportRejected")
    assert "invalid_signature" in event["note"] or "unknown_key_id" in event["note"]
    status = place.status("digits")
    assert status["history"] == before["history"]
    assert (status["rollbacks"]["total"], status["phase"]) == (1, "Running")
    assert status.get("lastFailure") is None
    assert not place.events("digits", "TrainerCrashed")
