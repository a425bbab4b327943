"""The cache of one kind, against an API server in memory, in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from esper_leyline.labels import RUN
from esper_operator.kube.api import JOBS, Object
from esper_operator.kube.errors import Throttled, Transient
from esper_operator.kube.informer import Informer
from esper_operator.model import RunKey
from esper_operator.testing.fakeapi import FakeApi, Request

from tests.support.virtualtime import run_virtual

DIGITS = RunKey("ns", "digits")


def job(name: str, run: str = "digits", **spec: Any) -> Object:
    metadata = {"namespace": "ns", "name": name, "labels": {RUN: run}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


class Cache:
    def __init__(self) -> None:
        self.api = FakeApi()
        self.woken: list[RunKey | None] = []
        self.counted: list[str] = []
        self.informer: Informer[Any] = Informer(
            self.api,
            JOBS,
            project=lambda item: item["spec"].get("size"),
            on_change=self.woken.append,
            on_event=lambda _, what: self.counted.append(what),
            jitter=lambda: 0.5,
        )

    @property
    def sizes(self) -> dict[str, Any]:
        return {entry.name: entry.value for entry in self.informer.of(DIGITS)}

    def edit(self, name: str, size: int | None) -> Object:
        return self.api.edit(JOBS, "ns", name, lambda item: item["spec"].update(size=size))


def played(story: Callable[[Cache], Awaitable[None]]) -> Cache:
    async def scenario() -> Cache:
        cache = Cache()
        task = asyncio.create_task(cache.informer.run())
        try:
            await story(cache)
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        return cache

    return run_virtual(scenario())


def test_it_holds_what_is_listed_and_what_is_watched_and_wakes_the_owner() -> None:
    async def story(cache: Cache) -> None:
        cache.api.add(job("a", size=1))
        cache.api.add(job("other", run="else", size=9))
        await cache.informer.wait_synced()
        assert cache.sizes == {"a": 1}
        cache.api.add(job("b", size=2))
        cache.edit("a", 3)
        await asyncio.sleep(1)
        assert cache.sizes == {"a": 3, "b": 2}
        cache.api.remove(JOBS, "ns", "a")
        await asyncio.sleep(1)
        assert cache.sizes == {"b": 2}

    assert played(story).woken.count(DIGITS) == 4


def test_all_pages_of_a_long_list_are_read() -> None:
    async def story(cache: Cache) -> None:
        for number in range(1_201):
            cache.api.add(job(f"j{number}", size=number))
        await cache.informer.wait_synced()
        assert len(cache.informer) == 1_201

    played(story)


def test_an_object_that_becomes_nobodys_is_dropped() -> None:
    async def story(cache: Cache) -> None:
        cache.api.add(job("a", size=1))
        await cache.informer.wait_synced()
        cache.edit("a", None)
        await asyncio.sleep(1)
        assert cache.sizes == {}

    played(story)


def test_what_vanished_while_nobody_watched_is_dropped_by_the_next_list() -> None:
    async def story(cache: Cache) -> None:
        cache.api.add(job("a", size=1))
        cache.api.add(job("b", size=2))
        await cache.informer.wait_synced()
        cache.api.break_watches()
        cache.api.remove(JOBS, "ns", "a")
        cache.api.forget_history()
        cache.woken.clear()
        await asyncio.sleep(5)
        assert cache.sizes == {"b": 2}
        assert cache.woken == [DIGITS]

    assert played(story).counted.count("RELIST") == 2


def test_a_broken_watch_goes_on_without_a_list() -> None:
    async def story(cache: Cache) -> None:
        await cache.informer.wait_synced()
        cache.api.break_watches()
        cache.api.add(job("a", size=1))
        await asyncio.sleep(5)
        assert cache.sizes == {"a": 1}

    assert played(story).counted.count("RELIST") == 1


def test_the_answer_to_our_own_write_is_not_undone_by_older_news() -> None:
    async def story(cache: Cache) -> None:
        cache.api.add(job("a", size=1))
        await cache.informer.wait_synced()
        older = cache.edit("a", 2)
        newer = cache.edit("a", 3)
        cache.informer.learn(newer)
        cache.informer.learn(older)
        assert cache.sizes == {"a": 3}
        await asyncio.sleep(1)
        assert cache.sizes == {"a": 3}

    played(story)


def test_the_end_of_an_earlier_object_of_that_name_does_not_drop_the_new_one() -> None:
    async def story(cache: Cache) -> None:
        cache.api.add(job("a", size=1))
        await cache.informer.wait_synced()
        cache.api.remove(JOBS, "ns", "a")
        cache.informer.learn(cache.api.add(job("a", size=2)))  # ahead of the watch's DELETED
        await asyncio.sleep(1)
        assert cache.sizes == {"a": 2}

    played(story)


def test_a_server_that_is_in_trouble_is_asked_ever_more_rarely_and_one_that_throttles_when_it_says() -> None:
    def refusing(error: Exception) -> Callable[[Request], None]:
        def before(_: Request) -> None:
            raise error

        return before

    async def story(cache: Cache) -> None:
        for error, most in ((Transient("trouble", code=503), 12), (Throttled("slow down", retry_after_s=20.0), 4)):
            cache.api.before = refusing(error)
            cache.api.forget_history()
            cache.api.break_watches()
            before = len(cache.api.requests)
            await asyncio.sleep(60)
            assert 1 < len(cache.api.requests) - before <= most, error
        cache.api.before = lambda _: None
        cache.api.add(job("a", size=1))
        await asyncio.sleep(40)
        assert cache.sizes == {"a": 1}

    played(story)


def test_the_return_of_a_server_that_was_unreachable_for_long_is_noticed_at_once() -> None:
    def away(_: Request) -> None:
        raise Transient("Connect call failed")

    async def story(cache: Cache) -> None:
        await asyncio.sleep(1)
        cache.api.before = away
        cache.api.forget_history()
        cache.api.break_watches()
        await asyncio.sleep(400)
        cache.api.before = lambda _: None
        cache.api.add(job("a", size=1))
        await asyncio.sleep(1.5)
        assert cache.sizes == {"a": 1}

    played(story)
