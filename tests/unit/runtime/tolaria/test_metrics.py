"""The trainer's metrics: what Prometheus reads of them, and what bounds them."""

import ast
import math
import re
from pathlib import Path

import pytest
from esper_leyline import paths
from esper_leyline.metrics import BY_NAME, TOLARIA, MetricKind
from esper_runtime import tolaria
from esper_runtime.tolaria.metrics import DROPPED, MAX_SERIES, WRITE_EVERY_S, Metrics
from prometheus_client.parser import text_string_to_metric_families

GAUGE, COUNTER, HISTOGRAM = "tolaria.training.loss", "tolaria.epochs.total", "tolaria.boundary.total_ms"
BY_PART = "tolaria.boundary.breaches_total"


def samples(metrics: Metrics) -> dict[str, float]:
    """Name with labels -> value, as Prometheus' own parser reads the text."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.render()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


# The catalogue


def test_names_are_unique_and_counters_are_named_as_such():
    assert len(BY_NAME) == len(TOLARIA)
    assert len({metric.prometheus for metric in TOLARIA}) == len(TOLARIA)


def test_histograms_have_rising_buckets_and_nothing_else_has_any():
    for metric in TOLARIA:
        assert (metric.kind is MetricKind.HISTOGRAM) == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name


def test_all_of_them_together_are_read_by_prometheus():
    """A value for every metric of the catalogue."""
    metrics = Metrics(None)
    for metric in TOLARIA:
        labels = {name: "x" for name in metric.labels}
        {MetricKind.GAUGE: metrics.set, MetricKind.COUNTER: metrics.add, MetricKind.HISTOGRAM: metrics.observe}[
            metric.kind
        ](metric.name, 1.5, **labels)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render())}
    for metric in TOLARIA:
        family = families.get(metric.prometheus) or families[metric.prometheus.removesuffix("_total")]
        assert family.type == metric.kind, metric.name
        assert family.documentation == f"{metric.text}."


# Values


def test_gauges_are_set_and_counters_add_up():
    metrics = Metrics(None)
    metrics.set(GAUGE, 2.5)
    metrics.set(GAUGE, 1 / 3)
    metrics.add(COUNTER)
    metrics.add(COUNTER, 2)
    assert metrics.value(GAUGE) == 1 / 3
    assert samples(metrics)["esper_tolaria_training_loss{}"] == 1 / 3, "to the last bit"
    assert samples(metrics)["esper_tolaria_epochs_total{}"] == 3


def test_a_gauge_that_was_never_set_is_not_there():
    metrics = Metrics(None)
    assert metrics.value(GAUGE) is None
    assert not any(name.startswith("esper_tolaria_training_loss") for name in samples(metrics))
    assert metrics.snapshot() == {}


def test_every_counter_is_0_before_its_first_event_so_that_increase_sees_it():
    """But for those whose label values nobody can know beforehand."""
    metrics = Metrics(None)
    found = samples(metrics)
    assert set(found.values()) == {0.0}
    for metric in TOLARIA:
        keys = metric.known if metric.labels else ((),)
        for key in keys if metric.kind is MetricKind.COUNTER else ():
            labels = ",".join(f"{name}={value}" for name, value in zip(metric.labels, key, strict=True))
            name = metric.prometheus.removesuffix("_total") + "_total"  # as the parser calls every counter
            assert found.pop(f"{name}{{{labels}}}") == 0.0
    assert found == {}
    metrics.add(COUNTER)
    metrics.add(BY_PART, part="tamiyo")
    found = samples(metrics)
    assert (found["esper_tolaria_epochs_total{}"], found["esper_tolaria_boundary_breaches_total{part=tamiyo}"]) == (
        1,
        1,
    )
    assert found["esper_tolaria_boundary_breaches_total{part=guard}"] == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_can_be_told(value: float):
    metrics = Metrics(None)
    metrics.set(GAUGE, value)
    read = samples(metrics)["esper_tolaria_training_loss{}"]
    assert read == value or (math.isnan(value) and math.isnan(read))


def test_a_histogram_counts_each_value_in_every_bucket_that_holds_it():
    metrics = Metrics(None)
    values = [0.5, 1.0, 1.1, 18.0, 18.1, 5000.0]
    for value in values:
        metrics.observe(HISTOGRAM, value)
    found = samples(metrics)
    name = "esper_tolaria_boundary_total_ms"
    for bound in BY_NAME[HISTOGRAM].buckets:
        assert found[f"{name}_bucket{{le={bound:g}}}"] == sum(value <= bound for value in values), bound
    assert found[f"{name}_bucket{{le=+Inf}}"] == found[f"{name}_count{{}}"] == len(values)
    assert found[f"{name}_sum{{}}"] == pytest.approx(sum(values))


def test_histograms_with_labels_are_kept_apart():
    metrics = Metrics(None)
    metrics.observe("tolaria.rollback.duration_ms", 3.0, tier="Fast")
    metrics.observe("tolaria.rollback.duration_ms", 4.0, tier="Full")
    found = samples(metrics)
    assert found["esper_tolaria_rollback_duration_ms_sum{tier=Fast}"] == 3.0
    assert found["esper_tolaria_rollback_duration_ms_sum{tier=Full}"] == 4.0


def test_labels_may_hold_any_text():
    metrics = Metrics(None)
    text = 'say "no"\\\n'
    metrics.add(BY_PART, part=text)
    metrics.add(BY_PART, part="x" * 1000)
    (first, second) = [
        sample
        for family in text_string_to_metric_families(metrics.render())
        for sample in family.samples
        if sample.value
    ]
    assert first.labels == {"part": text}
    assert len(second.labels["part"]) == 128


# Bounds and misuse


def test_more_label_sets_than_the_bound_are_dropped_and_counted():
    metrics = Metrics(None)
    for number in range(MAX_SERIES + 5):
        metrics.add(BY_PART, part=str(number))
    metrics.add(BY_PART, part="0")  # known ones go on
    assert metrics.value(BY_PART, part="0") == 2
    assert metrics.value(BY_PART, part=str(MAX_SERIES)) is None
    assert metrics.value(DROPPED, priority="LOW") == 5


@pytest.mark.parametrize(
    ("method", "name", "labels"),
    [("set", COUNTER, {}), ("add", GAUGE, {}), ("observe", GAUGE, {}), ("set", HISTOGRAM, {}), ("add", BY_PART, {}),
     ("add", COUNTER, {"part": "x"}), ("add", BY_PART, {"part": "x", "more": "y"})],
)  # fmt: skip
def test_a_metric_is_used_as_its_kind_and_with_its_labels(method: str, name: str, labels: dict[str, str]):
    with pytest.raises(TypeError, match=name):
        getattr(Metrics(None), method)(name, 1.0, **labels)


def test_a_name_that_is_not_in_the_catalogue_is_a_mistake():
    with pytest.raises(KeyError):
        Metrics(None).set("tolaria.nonsense", 1.0)


def test_the_snapshot_holds_what_has_no_labels():
    metrics = Metrics(None)
    metrics.set(GAUGE, 1.0)
    metrics.add(BY_PART, part="x")
    metrics.observe(HISTOGRAM, 1.0)
    assert metrics.snapshot() == {GAUGE: 1.0}


# The file


def test_the_file_is_replaced_whole_at_most_once_a_second(tmp_path: Path):
    now = 100.0
    metrics = Metrics(tmp_path, monotonic=lambda: now)
    path = tmp_path / paths.TRAINER_METRICS
    metrics.set(GAUGE, 1.0)
    metrics.write()
    first = path.stat().st_ino
    metrics.set(GAUGE, 2.0)
    now += WRITE_EVERY_S / 2
    metrics.write()
    assert "esper_tolaria_training_loss 1\n" in path.read_text()
    now += WRITE_EVERY_S
    metrics.write()
    assert "esper_tolaria_training_loss 2\n" in path.read_text()
    assert path.stat().st_ino != first
    assert [entry.name for entry in tmp_path.iterdir()] == [paths.TRAINER_METRICS]


def test_at_the_end_of_an_epoch_it_is_written_now(tmp_path: Path):
    metrics = Metrics(tmp_path, monotonic=lambda: 100.0)
    metrics.write()
    metrics.set(GAUGE, 2.0)
    metrics.write(now=True)
    assert "esper_tolaria_training_loss 2" in (tmp_path / paths.TRAINER_METRICS).read_text()


def test_without_a_directory_nothing_is_written():
    Metrics(None).write(now=True)


def test_a_volume_that_is_gone_is_the_caller_s_to_judge(tmp_path: Path):
    with pytest.raises(OSError, match="No such file"):
        Metrics(tmp_path / "gone").write(now=True)


# Names

_DESIGN = """
training.loss training.accuracy training.latency_ms epoch_hook.latency_ms hook.latency_ms breaker.state
mode.conservative epochs.total epochs.failed train.compile_enabled train.amp_enabled train.tf32_enabled
train.foreach_enabled train.pin_memory train.graph_enabled graph.stage_copy_ms graph.capture_ms graph.replay_ms
graph.replays_total lr_controller.enabled lr_controller.current_lr opt.rebuilds_total opt.rebuild_failures_total
opt.rebuild_skipped_total opt.rebuild_latency_ms rollback.fast_size_bytes rollback.snapshots_total
rollback.fast_hits_total rollback.fast_misses_total rollback.restore_latency_ms rollback.failures_total
rollback.deadline_exceeded_total timeout.tamiyo_total timeout.kasmina_total timeout.tamiyo_last_ms
timeout.kasmina_last_ms profiler.enabled profiler.traces_emitted_total profiler.traces_failed_total
emergency.halts_total emergency.halt boundary.total_ms boundary.assembly_ms boundary.tamiyo_ms boundary.apply_ms
boundary.guard_ms boundary.breaches_total conservative.seconds_total validation.loss validation.accuracy
validation.latency_ms train.samples_per_s train.input_wait_ms train.h2d_copy_ms train.step_ms checkpoint.duration_s
checkpoint.bytes checkpoint.generation checkpoint.age_s checkpoint.last_good_epoch checkpoint.failures_total
checkpoint.durability_mode rollback.attempts_total rollback.duration_ms rollback.snapshot_rejected_total
emergency.level emergency.transitions_total lr_controller.violations_total opt.state_preserved_ratio
amp.skipped_steps_total grad.norm_l2 grad.clipped_total telemetry.dropped_total
"""
"""Of the design, without those of seeds, gradient aggregation and broadcasts, which come with them. Never shorter."""
_OLDER = """
epochs_completed_total rollbacks_initiated_total rollbacks_succeeded_total lr_violations_total current_loss
current_accuracy memory_usage_gb epoch_duration_seconds checkpoint_duration_seconds rollback_duration_ms
"""


@pytest.mark.row("T31")
def test_dashboards_find_the_names_that_they_were_drawn_with():
    exported = {metric.prometheus for metric in TOLARIA}
    assert [name for name in _DESIGN.split() if f"tolaria.{name}" not in BY_NAME] == []
    assert [name for name in _OLDER.split() if f"esper_tolaria_{name}" not in exported] == []


@pytest.mark.row("T31")
def test_every_name_of_the_catalogue_is_set_somewhere_in_the_runtime():
    """As what is handed to a call of set, add or observe, or to a Meter: itself, an f-string that gives it, or a
    table's entry."""
    patterns = [
        re.compile(pattern) for path in Path(tolaria.__file__).parent.rglob("*.py") for pattern in _set_in(path)
    ]
    assert [name for name in BY_NAME if not any(pattern.fullmatch(name) for pattern in patterns)] == []


def _set_in(path):
    """Patterns of the names that a module gives to set, add or observe."""
    tree = ast.parse(path.read_text())
    tables = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    of_metrics = [call for call in calls if ast.unparse(call.func.value).endswith(("metrics", "registry"))]
    first = [call.args[0] for call in of_metrics if call.func.attr in ("set", "add", "observe") and call.args]
    meters = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Meter"]
    for argument in [*first, *(meter.args[1] for meter in meters)]:
        yield from _names(argument)
    if any(isinstance(argument, ast.Name | ast.Subscript | ast.Attribute) for argument in first):
        for value in tables.values():  # the names come out of one of the module's tables
            yield from _names(value)


def _names(node):
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            yield "".join(re.escape(p.value) if isinstance(p, ast.Constant) else r"\w+" for p in part.values)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.startswith("tolaria."):
            yield re.escape(part.value)
