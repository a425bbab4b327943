"""The cache of runs: newest version wins, neighbours on a claim are known, what the watch missed is found."""

import asyncio
from typing import Any

import pytest
from esper_operator import observe
from esper_operator.kube.api import RUNS, Object
from esper_operator.model import RunKey
from esper_operator.runs import RunCache
from esper_operator.testing.builders import SETTINGS, a_run
from esper_operator.testing.fakeapi import FakeApi


def raw(name: str, *, version: str = "1", uid: str = "", created: int = 0, **checkpoint: Any) -> Object:
    item = a_run(name, checkpoint={"storage": {"claimName": "shared", **checkpoint}}).raw()
    metadata = {
        "resourceVersion": version,
        "uid": uid or f"uid-{name}",
        "creationTimestamp": f"2026-01-01T00:00:{created:02d}Z",
    }
    return {**item, "metadata": {**item["metadata"], **metadata, "managedFields": [{}]}}


def key(name: str) -> RunKey:
    return RunKey("team", name)


class Bench:
    def __init__(self) -> None:
        self.changed: list[str] = []
        self.gone: list[tuple[str, str]] = []
        self.now = 0.0
        self.cache = RunCache(
            observe=lambda item: observe.run(item, SETTINGS),
            on_change=lambda k: self.changed.append(k.name),
            on_gone=lambda k, uid: self.gone.append((k.name, uid)),
            monotonic=lambda: self.now,
        )

    def put(self, *items: Object) -> list[str]:
        """Which runs were woken."""
        self.changed.clear()
        for item in items:
            self.cache.put(item)
        return list(self.changed)


def test_an_older_version_never_replaces_a_newer_one() -> None:
    bench = Bench()
    assert bench.put(raw("a", version="9")) == ["a"]
    assert bench.put(raw("a", version="10")) == ["a"]
    assert bench.put(raw("a", version="9"), raw("a", version="10")) == []
    found = bench.cache.get(key("a"))
    assert found is not None
    assert found.resource_version == "10"


def test_a_run_that_was_made_anew_is_another_run() -> None:
    bench = Bench()
    bench.put(raw("a", version="9"))
    bench.put(raw("a", version="3", uid="second"))
    assert bench.gone == [("a", "uid-a")]
    assert bench.cache.uid_of(key("a")) == "second"
    bench.cache.drop(key("a"), "uid-a")  # a late word of the first
    assert bench.cache.uid_of(key("a")) == "second"
    bench.cache.drop(key("a"), "second")
    assert (len(bench.cache), bench.cache.get(key("a"))) == (0, None)


def test_a_version_is_parsed_once_and_managed_fields_are_not_kept() -> None:
    bench = Bench()
    bench.put(raw("a"))
    assert bench.cache.get(key("a")) is bench.cache.get(key("a"))
    assert "managedFields" not in bench.cache._runs[key("a")].raw["metadata"]


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({}, {}, True),
        ({"subPath": "a"}, {"subPath": "a/"}, True),
        ({"subPath": "a/b"}, {"subPath": "a//b"}, True),
        ({"subPath": "a"}, {"subPath": "b"}, False),
        ({"subPath": "a"}, {}, False),
        ({}, {"claimName": "other"}, False),
    ],
)
def test_of_two_runs_on_one_place_the_first_is_senior(one: Any, two: Any, same: bool) -> None:
    bench = Bench()
    bench.put(raw("first", created=1, **one))
    woken = bench.put(raw("second", created=2, **two))
    assert bench.cache.senior_on_claim(key("first")) == ""
    assert bench.cache.senior_on_claim(key("second")) == ("team/first" if same else "")
    assert woken == (["second", "first"] if same else ["second"])


def test_a_run_with_an_attempt_is_senior_to_an_older_one_without() -> None:
    bench = Bench()
    late = raw("late", created=9)
    bench.put(raw("early", created=1), {**late, "status": {"attempt": 1}})
    assert bench.cache.senior_on_claim(key("early")) == "team/late"


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_run_that_is_over_wakes_who_waited_for_its_place(phase: str) -> None:
    bench = Bench()
    bench.put(raw("first", created=1), raw("second", created=2))
    over = {**raw("first", created=1, version="2"), "status": {"phase": phase}}
    assert bench.put(over) == ["first", "second"]
    assert bench.cache.senior_on_claim(key("second")) == ""


def test_a_claim_named_by_hand_meets_the_one_of_that_name_that_a_run_made() -> None:
    bench = Bench()
    maker = a_run("maker").raw()
    maker["metadata"].update(uid="uid-maker", creationTimestamp="2026-01-01T00:00:01Z")
    bench.put(maker, raw("guest", created=2, claimName="maker-checkpoints"))
    assert bench.cache.senior_on_claim(key("guest")) == "team/maker"


@pytest.mark.parametrize("broken", [{"spec": None}, {"spec": {"checkpoint": []}}, {"status": "x"}, {"status": []}])
def test_an_object_of_any_shape_is_borne(broken: Object) -> None:
    bench = Bench()
    assert bench.put({**raw("a"), **broken}) == ["a"]
    assert bench.cache.get(key("a")) is not None
    assert sum(bench.cache.phases().values()) == 1


def test_a_resync_finds_what_the_watch_has_missed() -> None:
    async def main() -> None:
        bench, api = Bench(), FakeApi()
        for name in ("stays", "vanishes"):
            bench.put(api.add(raw(name)))
        api.add(raw("unheard"))
        api.remove(RUNS, "team", "vanishes")
        bench.now = 10.0
        assert await bench.cache.resync(api, ()) == 2
        assert sorted(k.name for k in bench.cache) == ["stays", "unheard"]
        assert await bench.cache.resync(api, ("team",)) == 0

    asyncio.run(main())
