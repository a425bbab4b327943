"""The seed of all run keys is made once, agreed upon, and never replaced."""

import asyncio
import base64

import pytest
from esper_leyline.signing import SEED_BYTES
from esper_operator.keys import SEED, SeedError, load_or_make
from esper_operator.kube.api import SECRETS, Object
from esper_operator.testing.fakeapi import FakeApi, Request

PLACE = {"namespace": "esper-system", "name": "esper-operator-seed"}


def secret(data: dict[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": dict(PLACE), "data": data}


def test_it_is_made_at_the_first_start_and_found_at_the_next() -> None:
    api = FakeApi()
    first = asyncio.run(load_or_make(api, **PLACE))
    assert len(first) == SEED_BYTES
    assert asyncio.run(load_or_make(api, **PLACE)) == first
    (made,) = api.all(SECRETS)
    assert made["immutable"] is True


def test_replicas_that_start_at_once_agree_on_the_one_that_was_created_first() -> None:
    api = FakeApi()
    theirs = bytes(range(SEED_BYTES))

    def another_is_quicker(request: Request) -> None:
        if request.verb == "create":
            api.add(secret({SEED: base64.b64encode(theirs).decode()}))

    api.before = another_is_quicker
    assert asyncio.run(load_or_make(api, **PLACE)) == theirs


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
