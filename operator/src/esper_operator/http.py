"""/livez, /readyz and /metrics of the operator.

Live: the streams are heard, the queue moves, the loop is on time. Ready: the caches are filled, on a standby too, so
that a rollout does not wait for leadership.
"""

from collections.abc import Callable, Mapping

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from esper_operator.settings import PREFIX, SettingsError

Check = Callable[[], str]
"""What is wrong, in words; empty when all is well."""


def application(
    *, live: Mapping[str, Check], ready: Mapping[str, Check], registry: CollectorRegistry
) -> web.Application:
    async def livez(_: web.Request) -> web.Response:
        return _answer(live)

    async def readyz(_: web.Request) -> web.Response:
        return _answer(ready)

    async def metrics(_: web.Request) -> web.Response:
        body = generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    return app


def _answer(checks: Mapping[str, Check]) -> web.Response:
    found = {name: check() for name, check in checks.items()}
    text = "".join(f"{name}: {problem or 'ok'}\n" for name, problem in found.items())
    return web.Response(text=text or "ok\n", status=503 if any(found.values()) else 200)


async def serve(app: web.Application, port: int) -> web.AppRunner:
    """Listens on all addresses; clean up the runner to stop. SettingsError when the port is taken."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
    except OSError as error:
        await runner.cleanup()
        raise SettingsError(
            f"{PREFIX}HTTP_PORT is {port}: {error.strerror}; choose a free one, or 0 for none"
        ) from error
    return runner


def at_most(read: Callable[[], float], limit_s: float, what: str) -> Check:
    """A check that a duration stays below a limit."""

    def check() -> str:
        value = read()
        return f"{what}: {value:.1f} s, at most {limit_s:g} s" if value > limit_s else ""

    return check
