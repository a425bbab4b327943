import aiohttp
import pytest
from aiohttp import web
from esper_leyline import env
from esper_runtime.sidecar.environment import Environment, SettingsError
from esper_runtime.sidecar.http import ProbeServer, write_atomically
from prometheus_client import Counter


def environment(run_dir, port=0):
    return Environment({env.RUN_DIR: str(run_dir), env.HTTP_PORT: str(port)})


async def get(port, path, **headers):
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}", headers=headers) as answer,
    ):
        return answer.status, await answer.text()


async def test_readiness_says_what_is_missing_and_liveness_does_not_depend_on_it(tmp_path):
    problem = ["the keys are not loaded"]
    async with ProbeServer("kasmina", environment(tmp_path), ready=lambda: problem[0]) as probes:
        assert await get(probes.port, "/readyz") == (503, "the keys are not loaded\n")
        assert await get(probes.port, "/livez") == (200, "ok\n")
        problem[0] = ""
        assert await get(probes.port, "/readyz") == (200, "ok\n")


async def test_metrics_and_own_routes_are_served(tmp_path):
    async def hello(_):
        return web.Response(text="hello")

    async with ProbeServer("kasmina", environment(tmp_path), ready=str, routes=[web.get("/v1/hello", hello)]) as probes:
        Counter("esper_things", "Things.", registry=probes.registry).inc(3)
        status, text = await get(probes.port, "/metrics")
        assert status == 200
        assert "esper_things_total 3.0" in text
        assert "process_resident_memory_bytes" in text
        assert (await get(probes.port, "/v1/hello"))[1] == "hello"


async def test_a_free_port_is_written_down_and_kept_over_a_restart(tmp_path):
    async with ProbeServer("kasmina", environment(tmp_path), ready=str) as first:
        assert (tmp_path / "kasmina.port").read_text() == f"{first.port}\n"
    async with ProbeServer("kasmina", environment(tmp_path), ready=str) as second:
        assert second.port == first.port


async def test_a_port_that_was_taken_meanwhile_is_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with ProbeServer("kasmina", environment(tmp_path / "a"), ready=str) as other:
        (tmp_path / "b" / "kasmina.port").write_text(f"{other.port}\n")
        async with ProbeServer("kasmina", environment(tmp_path / "b"), ready=str) as probes:
            assert probes.port != other.port
            assert (tmp_path / "b" / "kasmina.port").read_text() == f"{probes.port}\n"


async def test_a_fixed_port_in_use_is_an_error_that_names_it(tmp_path):
    async with ProbeServer("kasmina", environment(tmp_path), ready=str) as first:
        with pytest.raises(SettingsError, match=f"{env.HTTP_PORT}={first.port}"):
            async with ProbeServer("kasmina", environment(tmp_path, first.port), ready=str):
                pass


def test_an_atomic_write_leaves_nothing_beside_the_file(tmp_path):
    write_atomically(tmp_path / "x", b"one")
    write_atomically(tmp_path / "x", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"two"
