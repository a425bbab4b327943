"""Users of runs in Redis, made by a real operator: there with the Secret, gone with the run, never in the way."""

import base64
from pathlib import Path

import pytest
import redis
from esper_leyline.oona import Oona, OonaConfig, OonaDenied, Status, acl, signals
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1.common_pb2 import BusMessageType

from tests.apiserver.operators import Cluster

pytestmark = [pytest.mark.apiserver, pytest.mark.slow, pytest.mark.timeout(300)]


def login(place: Cluster, tmp_path: Path, *, users: bool = True) -> dict[str, str]:
    """The operator's own user, and the settings that use it."""
    assert place.redis is not None
    with redis.Redis(port=place.redis.port) as admin:
        rules = acl.operator_rules(users=users)
        admin.execute_command("ACL SETUSER", *acl.setuser(acl.OPERATOR, "secret", rules))
    (tmp_path / "password").write_text("secret\n")
    return {"bus_username": acl.OPERATOR, "bus_password_file": str(tmp_path / "password")}


def users(place: Cluster) -> set[str]:
    assert place.redis is not None
    with redis.Redis(port=place.redis.port) as admin:
        return {str(name) for name in admin.acl_users()} - {"default", acl.OPERATOR}


def way(place: Cluster, run: str) -> OonaConfig:
    """As the run's pods read it from their Secret."""
    data = {key: base64.b64decode(value).decode() for key, value in place.get("secrets", f"{run}-bus")["data"].items()}
    return OonaConfig(url=data["url"], username=data["username"], password=data["password"])


async def test_a_run_has_its_own_user_for_as_long_as_it_lives(place: Cluster, tmp_path: Path) -> None:
    settings = login(place, tmp_path)
    await place.leading_operator(**settings)
    for name in ("one", "other"):
        place.create_run(name, steps=10_000)
    uid, other = place.uid("one"), place.uid("other")
    await place.until(lambda: users(place) == {f"run-{uid}", f"run-{other}"}, "both have users")
    await place.until(lambda: place.children("secrets", "one"), "the Secrets are there")
    key = SigningKey.derive(place.seed, uid, Role.REPORT)
    report = seal(b"x", BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT, run_uid=uid, key=key)
    await place.until(lambda: place.get("secrets", "one-bus").get("data"), "the way to Redis is there")
    async with Oona(way(place, "one")) as pod:
        assert (await pod.publish_report(report)).status is Status.PUBLISHED
        with pytest.raises(OonaDenied):
            await pod.last(signals(other))

    assert place.redis is not None
    place.redis.kill()
    place.redis.start()
    login(place, tmp_path)
    await place.until(lambda: users(place) == {f"run-{uid}", f"run-{other}"}, "a new server has the users again")

    place.delete_run("one")
    await place.until(lambda: users(place) == {f"run-{other}"}, "the deleted run's user is gone")
    place.operator.kill()
    place.delete_run("other")
    assert users(place) == {f"run-{other}"}
    await place.leading_operator("two", **settings)
    await place.until(lambda: not users(place), "what nobody removed is removed at the start")


async def test_a_redis_that_allows_no_users_stops_nothing_and_is_told(place: Cluster, tmp_path: Path) -> None:
    operator = await place.leading_operator(**login(place, tmp_path, users=False))
    place.create_run("digits", steps=20)
    await place.phase("digits", "Succeeded")
    await place.until(lambda: place.events("digits", "BusUnavailable"), "an Event says so")
    (event,) = place.events("digits", "BusUnavailable")
    assert "redis.perRunUsers=false" in event["note"]
    assert operator.metric("esper_bus_users_denied") == 1
    assert users(place) == set()
