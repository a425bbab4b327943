"""The examination of a server that goes away in the middle of it."""

import gc
import warnings

import pytest
from esper_leyline.oona import Oona, OonaConfig, OonaUnavailable, examine

from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.timeout(120)
QUESTIONS = 13


class Doomed(Oona):
    """Its server is killed before the question of that number."""

    def __init__(self, server, at):
        super().__init__(OonaConfig(url=server.url, timeout_s=1.0))
        self.server, self.at, self.asked = server, at, 0

    async def ask(self, call, timeout_s):
        if self.asked == self.at:
            self.server.kill()
        self.asked += 1
        return await super().ask(call, timeout_s)


@pytest.mark.parametrize("at", range(QUESTIONS))
async def test_no_question_is_left_unasked(at):
    """Python warns of a coroutine that was made and never awaited."""
    with RedisServer() as server, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        async with Doomed(server, at) as oona:
            with pytest.raises(OonaUnavailable):
                await examine(oona, "a-run")
            assert oona.asked == at + 1
        gc.collect()
        assert [str(one.message) for one in warned if "never awaited" in str(one.message)] == []


async def test_a_server_that_stays_is_examined_whole():
    with RedisServer() as server:
        async with Doomed(server, QUESTIONS) as oona:
            found = await examine(oona, "a-run")
            assert (found.problem, oona.asked) == ("", QUESTIONS)
