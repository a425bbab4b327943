"""What weatherlight's metrics say of the pod, of Redis and of orders to stop."""

from esper_leyline.oona import Status
from esper_leyline.pages import EmergencyRecord
from esper_leyline.v1.emergency_pb2 import EMERGENCY_MODE_CHECKPOINT
from esper_leyline.v1.report_pb2 import Counters
from esper_runtime.weatherlight.metrics import Metrics
from prometheus_client import CollectorRegistry


def made() -> tuple[Metrics, CollectorRegistry]:
    registry = CollectorRegistry()
    return Metrics(registry), registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"esper_{name}", labels)


def order(*, clear: bool = False) -> EmergencyRecord:
    return EmergencyRecord(
        term=1, seq=2, mode=EMERGENCY_MODE_CHECKPOINT, clear=clear, attempt=1, signal_id="0" * 32, arrived_ns=0,
        source=1,
    )  # fmt: skip


def test_there_is_one_mode_at_a_time_from_the_start() -> None:
    metrics, registry = made()
    for degraded in (False, True, False):
        metrics.mode(degraded=degraded)
        assert value(registry, "weatherlight_system_mode", mode="operational") == (not degraded)
        assert value(registry, "weatherlight_system_mode", mode="degraded") == degraded


def test_an_order_to_stop_is_shown_until_it_is_cleared() -> None:
    metrics, registry = made()
    metrics.ordered(None)
    assert value(registry, "weatherlight_emergency_mode") == 0
    metrics.applied(order(), "redis", 0.002)
    assert value(registry, "weatherlight_emergency_mode") == EMERGENCY_MODE_CHECKPOINT
    assert value(registry, "weatherlight_emergency_latency_ms") == 2
    metrics.applied(order(clear=True), "configmap", 0.001)
    assert value(registry, "weatherlight_emergency_mode") == 0
    assert value(registry, "weatherlight_emergency_detections_total") == 2
    assert value(registry, "weatherlight_signal_apply_seconds_count", leg="redis") == 1


def test_a_worker_that_was_restarted_knows_the_order_that_is_in_force() -> None:
    metrics, registry = made()
    metrics.ordered(order())
    metrics.restarted(3)
    assert value(registry, "weatherlight_emergency_mode") == EMERGENCY_MODE_CHECKPOINT
    assert value(registry, "weatherlight_emergency_detections_total") == 0, "it is not a new one"
    assert value(registry, "weatherlight_restarts_total") == 3


def test_publications_are_timed_when_redis_answers() -> None:
    metrics, registry = made()
    for outcome, took_s in ((Status.PUBLISHED, 0.001), (Status.REFUSED, 0.003), (Status.UNAVAILABLE, 0.5)):
        metrics.published(outcome, took_s)
        assert value(registry, "weatherlight_publications_total", outcome=outcome) == 1
    assert value(registry, "oona_publish_total") == 1
    assert value(registry, "oona_publish_latency_ms") == 3
    assert value(registry, "oona_message_publish_duration_ms_count") == 2


def test_its_age_grows_by_itself() -> None:
    now = 100.0
    registry = CollectorRegistry()
    Metrics(registry, monotonic=lambda: now)
    now += 7
    assert value(registry, "weatherlight_uptime_s") == 7


def test_totals_of_the_run_are_those_of_its_log_and_absent_until_somebody_knows_them() -> None:
    """Else a new pod would begin at 0, and increase() would see all of them come again."""
    metrics, registry = made()
    assert value(registry, "run_rollbacks_total") is None
    metrics.totals(Counters(rollbacks=7, in_place_restarts=2))
    assert value(registry, "run_rollbacks_total") == 7
    assert value(registry, "run_in_place_restarts_total") == 2
    assert value(registry, "run_skipped_batches_total") == 0
    fields = [field.name for field in Counters.DESCRIPTOR.fields]
    assert [value(registry, f"run_{name}_total") is not None for name in fields] == [True] * len(fields)


def test_workers_and_the_breaker_before_redis_are_there_before_anything_happens() -> None:
    _, registry = made()
    assert value(registry, "weatherlight_worker_restarts_total", worker="journal") == 0
    assert value(registry, "oona_publish_breaker_state") == 1
    assert value(registry, "weatherlight_rollback_detections_total") == 0
