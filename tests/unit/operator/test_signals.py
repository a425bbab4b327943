"""Emergency signals on their way out: the same signal however often it is sent, by both legs, to every pod."""

import asyncio
import base64
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import wraps
from inspect import signature
from typing import Any

import pytest
from esper_leyline import labels
from esper_leyline.oona import Outcome, Status
from esper_leyline.phases import EmergencyStop, HaltSource
from esper_leyline.signing import Role, SigningKey, Verifier
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.emergency_pb2 import EmergencyMode, EmergencySignal
from esper_operator import build, observe
from esper_operator.kube.api import CONFIG_MAPS, PODS, Object
from esper_operator.kube.errors import KubeError, Transient
from esper_operator.model import Pod, SignalOrder
from esper_operator.signals import ANSWER_PATIENCE_S, BUS_PATIENCE_S, Signals
from esper_operator.testing.builders import a_run, pod_manifest
from esper_operator.testing.fakeapi import FakeApi, Request

from tests.support.virtualtime import run_virtual

STOP = SignalOrder(mode=EmergencyStop.CHECKPOINT, source=HaltSource.SPEC, reason="a person said so", attempt=1)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Bench:
    def __init__(self) -> None:
        self.api = FakeApi(now=lambda: NOW)
        self.scene = a_run().reconciled().with_pods()
        self.run = self.scene.seen().run
        for child in build.children(self.run, self.scene.settings):
            self.api.add(child.manifest)
        for raw in self.scene.pods:
            self.api.add({"apiVersion": "v1", "kind": "Pod", **raw})
        self.pods = [self.pod()]
        self.published: list[EmergencySignal] = []
        self.bus_takes_s = 0.0
        self.bus_up = True
        self.answered: set[str] = set()
        self.signals = self.operator()

    def operator(self, term: int = 1, generation: int = 1) -> Signals:
        async def publish(envelopes: Mapping[str, BusEnvelope]) -> dict[str, Outcome]:
            await asyncio.sleep(self.bus_takes_s)
            if not self.bus_up:
                return dict.fromkeys(envelopes, Outcome(status=Status.UNAVAILABLE, detail="down"))
            self.published += [EmergencySignal.FromString(envelope.payload) for envelope in envelopes.values()]
            return dict.fromkeys(envelopes, Outcome(status=Status.PUBLISHED))

        return Signals(
            self.api,
            seed=self.scene.settings.key_seed,
            generation=generation,
            term=lambda: term,
            now=lambda: NOW,
            monotonic=asyncio.get_running_loop().time,
            publish=publish,
            answered=lambda _uid, _signal: self.answered,
        )

    def pod(self) -> Pod:
        name = self.scene.pods[0]["metadata"]["name"]
        found = observe.pod(self.api.find(PODS, self.scene.namespace, name))
        assert found is not None
        return found

    def stored(self) -> EmergencySignal:
        """From the ConfigMap; its signature must be the operator's."""
        raw = self.config_map()
        envelope = BusEnvelope.FromString(base64.b64decode(raw["data"]["signal"]))
        key = SigningKey.derive(self.scene.settings.key_seed, self.run.uid, Role.OPERATOR)
        Verifier.from_text(key.public_text()).check_envelope(envelope)
        return EmergencySignal.FromString(envelope.payload)

    def config_map(self) -> Object:
        found = self.api.find(CONFIG_MAPS, self.scene.namespace, "digits-emergency")
        assert found is not None
        return found

    def touches(self) -> list[str]:
        annotations = self.api.find(PODS, self.scene.namespace, self.pods[0].name)["metadata"]["annotations"]  # type: ignore[index]
        return [annotations[labels.SIGNAL]] if labels.SIGNAL in annotations else []

    def fail(self, kind: str, error: KubeError, *, times: int = 1, after: bool = False) -> None:
        """The next writes of that kind fail, before or after they took effect."""
        left = times

        def hook(request: Request) -> None:
            nonlocal left
            if request.writes and request.kind == kind and left:
                left -= 1
                raise error

        if after:
            self.api.after = hook
        else:
            self.api.before = hook


def with_bench(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Gives the test its Bench, in virtual time."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def main() -> None:
            await test(Bench(), *args, **kwargs)

        run_virtual(main())

    run.__signature__ = signature(test).replace(parameters=list(signature(test).parameters.values())[1:])  # type: ignore[attr-defined]
    return run


@with_bench
async def test_a_signal_goes_by_both_legs_and_touches_the_pods(bench: Bench) -> None:
    record = await bench.signals.send(bench.run, STOP, bench.pods)
    stored = bench.stored()
    assert [s.signal_id for s in bench.published] == [stored.signal_id] == [record.signal_id]
    assert (stored.mode, stored.attempt, stored.clear) == (EmergencyMode.EMERGENCY_MODE_CHECKPOINT, 1, False)
    assert (stored.term, stored.seq, stored.run_uid, stored.reason) == (1, 1, bench.run.uid, "a person said so")
    assert bench.config_map()["metadata"]["annotations"][labels.SIGNAL] == "1.1"
    await asyncio.sleep(2 * ANSWER_PATIENCE_S)
    assert bench.touches() == ["1.1"]
    assert await bench.signals.last(bench.run) == record


@with_bench
async def test_the_next_signal_has_the_next_number_and_a_clear_names_what_it_lifts(bench: Bench) -> None:
    first = await bench.signals.send(bench.run, STOP, bench.pods)
    clear = SignalOrder(mode=STOP.mode, source=STOP.source, reason="", attempt=1, clear=True, signal_id=first.signal_id)
    second = await bench.signals.send(bench.run, clear, bench.pods)
    assert (second.seq, second.clear, second.signal_id) == (2, True, first.signal_id)
    third = await bench.signals.send(bench.run, STOP, bench.pods)
    assert third.seq == 3
    assert third.signal_id != first.signal_id


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@with_bench
async def test_a_signal_that_is_sent_again_after_an_error_is_the_same_signal(bench: Bench, after: bool) -> None:
    bench.fail("ConfigMap", Transient("the answer was lost"), after=after)
    with pytest.raises(Transient):
        await bench.signals.send(bench.run, STOP, bench.pods)
    sent_before = bench.published[0].signal_id
    last = await bench.signals.last(bench.run)
    assert last is not None
    assert last.signal_id == sent_before  # so the policy sends it no more
    await bench.signals.finish(bench.run, bench.pods)
    assert bench.stored().signal_id == sent_before
    assert (await bench.signals.send(bench.run, STOP, bench.pods)).signal_id == sent_before
    assert len(bench.published) == 1


@with_bench
async def test_another_operators_write_in_between_is_seen_and_followed(bench: Bench) -> None:
    await bench.signals.last(bench.run)
    await bench.operator(term=2).send(bench.run, STOP, bench.pods)
    record = await bench.signals.send(bench.run, STOP, bench.pods)
    assert (record.term, record.seq) == (2, 1)  # it asks for the same
    later = await bench.signals.send(bench.run, replace(STOP, mode=EmergencyStop.KILL), bench.pods)
    assert (later.term, later.seq) == (2, 2)  # never below what pods may have seen


@with_bench
async def test_redis_that_hangs_holds_up_nothing_and_is_not_given_up(bench: Bench) -> None:
    bench.bus_takes_s = 5.0
    began = asyncio.get_running_loop().time()
    await bench.signals.send(bench.run, STOP, bench.pods)
    assert asyncio.get_running_loop().time() - began == pytest.approx(BUS_PATIENCE_S)
    assert bench.stored().seq == 1
    assert bench.published == []
    await asyncio.sleep(5)
    assert [s.seq for s in bench.published] == [1]


@with_bench
async def test_a_pod_that_has_answered_by_redis_is_not_touched(bench: Bench) -> None:
    await bench.signals.send(bench.run, STOP, bench.pods)
    bench.answered.add(bench.pods[0].name)
    await asyncio.sleep(60)
    assert bench.touches() == []


@with_bench
async def test_without_redis_the_pods_are_touched_at_once(bench: Bench) -> None:
    bench.bus_up = False
    await bench.signals.send(bench.run, STOP, bench.pods)
    assert bench.touches() == ["1.1"]


@with_bench
async def test_what_was_announced_is_the_last_signal_and_the_next_one_goes_on_from_it(bench: Bench) -> None:
    """A halt that is lifted before the API server has its record is cleared all the same."""
    await bench.signals.last(bench.run)
    await bench.signals.announce([(bench.run, STOP)])
    assert not bench.signals.settled(bench.run.uid)
    assert "signal" not in bench.config_map().get("data", {})
    announced = await bench.signals.last(bench.run)
    assert announced is not None
    lift = replace(STOP, clear=True, signal_id=announced.signal_id)
    cleared = await bench.signals.send(bench.run, lift, bench.pods)
    assert (cleared.seq, cleared.clear, cleared.signal_id) == (2, True, announced.signal_id)
    assert bench.stored().seq == 2
    await bench.signals.record(bench.run, bench.pods)
    assert bench.stored().seq == 2


@with_bench
async def test_an_announced_signal_is_recorded_once_however_many_see_to_it(bench: Bench) -> None:
    await bench.signals.last(bench.run)
    bench.signals.announce([(bench.run, STOP)])
    bench.api.requests.clear()
    await asyncio.gather(
        bench.signals.record(bench.run, bench.pods),
        bench.signals.finish(bench.run, bench.pods),
        bench.signals.send(bench.run, STOP, bench.pods),
    )
    assert [request.kind for request in bench.api.requests].count("ConfigMap") == 1
    assert len(bench.published) == 1


@with_bench
async def test_an_announced_signal_survives_an_edit_of_its_config_map(bench: Bench) -> None:
    await bench.signals.last(bench.run)
    bench.signals.announce([(bench.run, STOP)])
    bench.api.edit(CONFIG_MAPS, bench.scene.namespace, "digits-emergency", lambda raw: raw.update(extra="by hand"))
    await bench.signals.record(bench.run, bench.pods)
    assert bench.stored().seq == 1
    assert len(bench.published) == 1


@with_bench
async def test_a_touch_that_failed_is_made_up_for(bench: Bench) -> None:
    """Without it the kubelet would show the signal a minute later."""
    bench.fail("Pod", Transient("overloaded"))
    await bench.signals.send(bench.run, STOP, bench.pods)
    await asyncio.sleep(2 * ANSWER_PATIENCE_S)
    assert bench.touches() == []
    halting = bench.scene.stopped("Checkpoint").reconciled().seen().run
    await bench.signals.finish(halting, bench.pods)
    assert bench.touches() == ["1.1"]
    bench.api.requests.clear()
    await bench.signals.finish(halting, bench.pods)
    assert bench.api.requests == []


@with_bench
async def test_a_restarted_operator_touches_what_its_predecessor_did_not(bench: Bench) -> None:
    await bench.signals.send(bench.run, STOP, bench.pods)  # and is killed before the pods have had their time
    second = bench.operator(term=2)
    halting = bench.scene.stopped("Checkpoint").reconciled().seen().run
    await second.last(halting)
    await second.finish(halting, bench.pods)
    assert bench.touches() == ["1.1"]


@with_bench
async def test_a_pod_of_the_same_name_that_came_later_is_not_touched(bench: Bench) -> None:
    pod = pod_manifest(bench.scene, "training", attempt=1)
    bench.api.remove(PODS, bench.scene.namespace, bench.pods[0].name)
    await bench.signals.send(bench.run, STOP, bench.pods)
    assert bench.stored().seq == 1
    assert bench.api.find(PODS, bench.scene.namespace, pod["metadata"]["name"]) is None


@with_bench
async def test_a_reason_of_any_length_and_script_is_cut_to_whole_characters(bench: Bench) -> None:
    order = SignalOrder(mode=STOP.mode, source=STOP.source, reason="ä" * 1000, attempt=1)
    await bench.signals.send(bench.run, order, bench.pods)
    assert bench.stored().reason == "ä" * 128


@with_bench
async def test_a_rotation_puts_the_last_signal_under_the_new_key_and_numbers_go_on(bench: Bench) -> None:
    first = await bench.signals.send(bench.run, STOP, bench.pods)
    before = bench.stored()
    rotated = bench.operator(term=2, generation=2)
    assert await rotated.last(bench.run) == first
    key = SigningKey.derive(bench.scene.settings.key_seed, bench.run.uid, Role.OPERATOR, 2)
    envelope = BusEnvelope.FromString(base64.b64decode(bench.config_map()["data"]["signal"]))
    Verifier.from_text(key.public_text()).check_envelope(envelope)
    assert EmergencySignal.FromString(envelope.payload) == before
    bench.api.requests.clear()
    assert await rotated.last(bench.run) == first
    assert bench.api.requests == []
    second = await rotated.send(bench.run, replace(STOP, mode=EmergencyStop.KILL), bench.pods)
    assert (second.term, second.seq) == (2, 2)


@with_bench
async def test_two_rotations_later_a_signal_under_the_first_key_counts_no_more(bench: Bench) -> None:
    await bench.signals.send(bench.run, STOP, bench.pods)
    assert await bench.operator(term=2, generation=3).last(bench.run) is None
