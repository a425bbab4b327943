"""The trainer's metrics: what Prometheus reads of them, and what bounds them."""

import math
from pathlib import Path

import pytest
from esper_leyline import paths
from esper_leyline.metrics import BY_NAME, TOLARIA, MetricKind
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


def test_what_was_never_set_is_not_there():
    metrics = Metrics(None)
    assert metrics.value(GAUGE) is None
    assert metrics.render() == ""


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
    ]  # fmt: skip
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
    assert path.read_text().endswith("esper_tolaria_training_loss 1\n")
    now += WRITE_EVERY_S
    metrics.write()
    assert path.read_text().endswith("esper_tolaria_training_loss 2\n")
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
