"""Breaks under the rows of metrics, alerts and dashboards."""

from tests.acceptance.breaking import Break

M, N = "proto/src/esper_leyline/metrics/", "runtime/src/esper_runtime/nissa/"
RULES = "charts/esper/rules/esper-"
DATA, ALERTS = "tests/nissa/test_data.py::test_", "tests/nissa/test_promtool.py::test_alerts_fire_when_they_should_and"
NAMES = "tests/unit/leyline/test_metrics.py::test_"
REAL = "tests/nissa/test_real_prometheus.py::test_"

# fmt: off
NISSA: tuple[Break, ...] = (
    Break("K44", M + "weatherlight.py", '"weatherlight.uptime_s"', '"weatherlight.uptime_seconds"',
          NAMES + "no_metric_that_there_was_is_gone_or_another", "a metric has another name"),
    Break("K44", M + "oona.py", 'Metric("oona.publish_total", _C,', 'Metric("oona.published_total", _C,',
          NAMES + "names_of_the_design_stay", "a name of the design is given up"),

    Break("K45", N + "dashboards/overview.py", "max by (namespace) (esper_workqueue_depth)",
          "max by (namespace) (esper_queue_depth)", DATA + "a_panel_reads_what_is_exported",
          "a panel reads a series that nobody exports"),
    Break("K45", N + "dashboards/run.py", '_q("esper_tolaria_breaker_state", "{{name}}")',
          '_q("esper_tolaria_breaker_states", "{{name}}")', DATA + "a_panel_reads_what_is_exported",
          "a series is misspelt"),
    Break("K45", N + "series.py", "for label in sorted(selector.labels - labels)", "for label in ()",
          DATA + "the_scan_tells_what_does_not_exist", "labels that do not exist are not noticed"),

    Break("K46", RULES + "bus.yaml", "(esper_oona_queue_depth) > 4000", "(esper_oona_queue_depth) >= 4000",
          ALERTS + "_only_then[esper-bus]", "an alert fires at its limit"),
    Break("K46", RULES + "bus.yaml", "min_over_time(esper_oona_dead_letters[15m])", "min(esper_oona_dead_letters)",
          ALERTS + "_only_then[esper-bus]", "dead letters that came are not told"),
    Break("K46", RULES + "recovery.yaml", "esper_tolaria_trainer_silent_seconds > 120",
          "esper_tolaria_trainer_silent_seconds > 130", ALERTS + "_only_then[esper-recovery]",
          "a silent trainer is told too late"),
    Break("K46", RULES + "sidecars.yaml", 'up{container="kasmina"} == 0', 'up == 0',
          ALERTS + "_only_then[esper-sidecars]", "another container's absence is taken for Kasmina's"),

    Break("K47", "runtime/src/esper_runtime/tolaria/budget.py",
          'metrics.set("tolaria.epoch_hook.latency_ms", times.total)', "pass",
          REAL + "no_panel_about_runs_is_empty", "a gauge of a panel is never set"),
    Break("K47", "runtime/src/esper_runtime/tolaria/publish.py",
          'self._metrics.set("tolaria.train.samples_per_s", sums.samples / took_s)', "pass",
          REAL + "everything_that_is_declared_is_exported", "a metric is declared and never set"),
)
# fmt: on
