"""Each leg of an emergency, through a whole pod of real processes: in time, to everybody, once.

A slice of what bench_emergency measures. Times are judged by the median, which a busy machine does not move much.
"""

from pathlib import Path

import pytest
from esper_leyline.oona import Oona, OonaConfig

from tests.bench import nerves
from tests.bench.bench_emergency import Legs, Shooter
from tests.bench.common import quantile
from tests.bench.nerves import NervesPod

pytestmark = pytest.mark.timeout(300)
LIMIT_MS = 100.0
SHOTS = 8


@pytest.mark.row("T25", "K08")
async def test_every_leg_alone_brings_an_emergency_to_every_process_in_time_and_it_counts_once(tmp_path: Path) -> None:
    with (
        nerves.places(tmp_path) as (memory, disk),
        nerves.redis_server(disk) as server,
        NervesPod(memory, disk, redis_url=server.url) as pod,
    ):
        pod.start()
        shooter = Shooter(pod)
        async with Oona(OonaConfig(url=server.url)) as oona:
            legs = Legs(pod, oona)
            found = {
                "redis": await shooter.series(legs.redis, SHOTS),
                "file": await shooter.series(legs.file, SHOTS),
                "both": await shooter.series(legs.both, SHOTS),
            }
            with nerves.redis_down(server):
                found["both, Redis down"] = await shooter.series(legs.both, SHOTS)
        shooter.close()
        weatherlight = pod.weatherlight
        assert weatherlight is not None
        accepted = {
            leg: weatherlight.metric(f'esper_weatherlight_signals_total{{leg="{leg}",verdict="accepted"}}')
            for leg in ("redis", "configmap")
        }
    for leg, series in found.items():
        for what, values in (("the training loop", series.loop), ("all answers", series.answers)):
            assert quantile(values, 0.5) <= LIMIT_MS, f"{leg}, {what}: {values}"
    # A signal that stops and one that lifts, for each shot.
    assert sum(accepted.values()) == 2 * 4 * SHOTS
    assert accepted["redis"] >= 2 * SHOTS
    assert accepted["configmap"] >= 2 * 2 * SHOTS
