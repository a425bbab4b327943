import pytest
from esper_runtime.sidecar.init import MAX_BACKOFF_S, restart_delay_s


@pytest.mark.parametrize(("deaths", "delay_s"), [(0, 0), (1, 0), (2, 0.1), (3, 0.2), (5, 0.8), (100, MAX_BACKOFF_S)])
def test_the_first_restart_is_immediate_and_the_back_off_is_capped(deaths, delay_s):
    assert restart_delay_s(deaths) == pytest.approx(delay_s)
