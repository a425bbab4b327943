"""The seed of all run keys is made once, agreed upon, and never replaced."""

import asyncio
import base64

import pytest
from esper_leyline.labels import KEY_GENERATION
from esper_leyline.signing import SEED_BYTES
from esper_operator.keys import SEED, GenerationError, SeedError, load_or_make
from esper_operator.kube.api import SECRETS, Object
from esper_operator.testing.fakeapi import FakeApi, Request

PLACE = {"namespace": "esper-system", "name": "esper-operator-seed"}


def secret(data: dict[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": dict(PLACE), "data": data}


def test_it_is_made_at_the_first_start_and_found_at_the_next() -> None:
    api = FakeApi()
    first, _ = asyncio.run(load_or_make(api, **PLACE))
    assert len(first) == SEED_BYTES
    assert asyncio.run(load_or_make(api, **PLACE)) == (first, 1)
    (made,) = api.all(SECRETS)
    assert made["immutable"] is True


def test_replicas_that_start_at_once_agree_on_the_one_that_was_created_first() -> None:
    api = FakeApi()
    theirs = bytes(range(SEED_BYTES))

    def another_is_quicker(request: Request) -> None:
        if request.verb == "create":
            api.add(secret({SEED: base64.b64encode(theirs).decode()}))

    api.before = another_is_quicker
    assert asyncio.run(load_or_make(api, **PLACE)) == (theirs, 1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "has 0 bytes"),
        ({SEED: base64.b64encode(b"short").decode()}, "has 5 bytes"),
        ({SEED: "no base64!"}, "is no base64"),
    ],
)
def test_one_that_cannot_be_used_is_named_and_left_alone(data: dict[str, str], said: str) -> None:
    api = FakeApi()
    api.add(secret(data))
    with pytest.raises(SeedError, match=f"Secret esper-operator-seed: key 'seed' {said}"):
        asyncio.run(load_or_make(api, **PLACE))
    assert [found.get("data") for found in api.all(SECRETS)] == [data]


def test_the_generation_in_force_rises_by_one_and_never_falls() -> None:
    api = FakeApi()
    seed, in_force = asyncio.run(load_or_make(api, **PLACE))
    assert in_force == 1
    for asked, then in ((2, 2), (2, 2), (1, 2), (3, 3)):
        assert asyncio.run(load_or_make(api, **PLACE, generation=asked)) == (seed, then)
    with pytest.raises(
        GenerationError, match=r"keys of generation 5 are asked for and 3 are in force.* ask for 4 first"
    ):
        asyncio.run(load_or_make(api, **PLACE, generation=5))


def test_a_new_seed_may_begin_with_any_generation() -> None:
    api = FakeApi()
    assert asyncio.run(load_or_make(api, **PLACE, generation=7))[1] == 7
    assert asyncio.run(load_or_make(api, **PLACE))[1] == 7


def test_a_generation_that_is_no_number_is_named() -> None:
    api = FakeApi()
    made = secret({SEED: base64.b64encode(bytes(32)).decode()})
    made["metadata"]["annotations"] = {KEY_GENERATION: "two"}
    api.add(made)
    with pytest.raises(SeedError, match=f"annotation {KEY_GENERATION} is 'two'; it must be a number from 1"):
        asyncio.run(load_or_make(api, **PLACE))
