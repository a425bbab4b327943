"""Events of the record: each has a name of its own, a meaning, and a place in the order of what is dropped."""

from esper_leyline.events import MEANING, Level, RunEvent, priority
from esper_leyline.v1.common_pb2 import MESSAGE_PRIORITY_CRITICAL, MESSAGE_PRIORITY_LOW


def test_each_event_is_explained_once():
    assert list(MEANING) == list(RunEvent)
    assert all(event.startswith("tolaria.") for event in RunEvent)


def test_only_what_repeats_itself_is_dropped_first_and_nothing_critical_is():
    low = {event for event in RunEvent if priority(event, Level.INFO) == MESSAGE_PRIORITY_LOW}
    assert low == {RunEvent.PROGRESS, RunEvent.METRICS}
    assert all(priority(event, Level.CRITICAL) == MESSAGE_PRIORITY_CRITICAL for event in RunEvent)
