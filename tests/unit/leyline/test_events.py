"""Events: each has a name of its own, a meaning, its levels, and a place in the order of what is dropped."""

import pytest
from esper_leyline.events import HEALTH, LEVELS, MEANING, PRIORITY, Level, RunEvent, level_of, priority
from esper_leyline.v1.common_pb2 import MESSAGE_PRIORITY_CRITICAL, MESSAGE_PRIORITY_LOW, HealthStatus, MessagePriority


def test_each_event_is_explained_once():
    assert list(MEANING) == list(RunEvent)


@pytest.mark.row("K14")
def test_each_event_has_its_levels_mildest_first():
    assert list(LEVELS) == list(RunEvent)
    for event, held in LEVELS.items():
        assert held, event
        assert list(held) == [level for level in Level if level in held], event


@pytest.mark.row("K14")
@pytest.mark.parametrize(
    ("level", "priority", "health"),
    [("INFO", "NORMAL", "HEALTHY"), ("WARNING", "HIGH", "DEGRADED"), ("ERROR", "HIGH", "UNHEALTHY"),
     ("CRITICAL", "CRITICAL", "CRITICAL")],
)  # fmt: skip
def test_a_level_has_its_priority_and_its_health(level: str, priority: str, health: str):
    assert PRIORITY[Level(level)] == MessagePriority.Value(f"MESSAGE_PRIORITY_{priority}")
    assert HEALTH[Level(level)] == HealthStatus.Value(f"HEALTH_STATUS_{health}")


@pytest.mark.row("K14")
def test_who_tells_an_event_has_a_say_where_the_catalogue_leaves_its_level_open():
    for event, held in LEVELS.items():
        for wanted in Level:
            assert level_of(event, wanted) is (wanted if wanted in held else held[0]), event


def test_only_what_repeats_itself_is_dropped_first_and_nothing_critical_is():
    low = {event for event in RunEvent if priority(event, Level.INFO) == MESSAGE_PRIORITY_LOW}
    assert low == {RunEvent.PROGRESS, RunEvent.METRICS}
    assert all(priority(event, Level.CRITICAL) == MESSAGE_PRIORITY_CRITICAL for event in RunEvent)
