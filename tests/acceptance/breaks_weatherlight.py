"""Breaks of what weatherlight shows: missed deadlines, workers, the system mode, telemetry and its levels."""

from tests.acceptance.breaking import Break

T = "runtime/src/esper_runtime/tolaria/"
W = "runtime/src/esper_runtime/weatherlight/"
SIDECAR = "runtime/src/esper_runtime/sidecar/"
LEYLINE = "proto/src/esper_leyline/"
UNIT = "tests/unit/runtime/tolaria/test_"
MODE = "tests/unit/runtime/weatherlight/test_mode.py::test_"
EVENTS = "tests/unit/leyline/test_events.py::test_"
BREAKER = "tests/unit/leyline/test_oona_breaker.py::test_"
TELEMETRY = "tests/integration/test_telemetry.py::test_"
WORKERS = "tests/integration/test_weatherlight_workers.py::test_"

# fmt: off
WEATHERLIGHT: tuple[Break, ...] = (
    Break("T22", T + "restore.py", "RunEvent.ROLLBACK_DEADLINE if late else RunEvent.RESTORE_FAILED",
          "RunEvent.RESTORE_FAILED",
          "tests/integration/trainer/test_tiers.py::test_a_late_fast_rollback_is_kept_and_counted",
          "a missed deadline is told as any other failure"),
    Break("T22", T + "restore.py", "        late = outcome is RestoreOutcome.DEADLINE_EXCEEDED\n",
          "        late = outcome is RestoreOutcome.DEADLINE_EXCEEDED and step is not None\n",
          "tests/integration/trainer/test_tiers.py::"
          "test_a_full_tier_over_its_deadline_ends_the_run_with_the_model_unchanged[Fail-73]",
          "the deadline that ends the run is told as any other failure"),
    Break("T43", T + "consult.py", 'self.metrics.add(f"tolaria.timeout.{silence.component}_total")', "pass",
          UNIT + "consult.py::test_a_timeout_has_its_event_and_its_metrics_and_leads_to_the_mode_with_its_own[kasmina]",
          "timeouts are told and not counted"),
    Break("T43", T + "stability.py",
          'self._events.notice(RunReason.BREAKER_CLOSED, f"breaker {part} closed: it works again")', "pass",
          UNIT + "standing.py::test_each_breaker_is_told_and_shown_when_it_opens_and_when_it_closes[kasmina]",
          "a breaker that closes says nothing"),
    Break("T43", W + "bus.py", "self._narrator.say(_BREAKER_EVENTS[state], RunReason.BUS_UNAVAILABLE, message)",
          "log.info(message)",
          WORKERS + "the_breaker_before_redis_is_told_when_it_opens_and_when_it_has_closed",
          "the bus is conservative in silence"),

    Break("K07", W + "recorder.py", "if event.name == RunEvent.ROLLBACK_DEADLINE:",
          "if event.name == RunEvent.RESTORE_FAILED:",
          WORKERS + "every_missed_deadline_is_on_the_emergency_stream_at_once_and_once",
          "missed deadlines are not counted"),
    Break("K07", LEYLINE + "events.py", "RunEvent.ROLLBACK_DEADLINE: _CRITICAL", "RunEvent.ROLLBACK_DEADLINE: _ERROR",
          UNIT + "narrate.py::test_a_missed_deadline_has_a_name_of_its_own_and_is_critical",
          "a missed deadline waits behind others"),
    Break("K10", LEYLINE + "oona/breaker.py", "self._open_until = self._clock() + self._backoff.next_s()",
          "self._open_until = self._clock() + 2 * self._backoff.next_s()",
          BREAKER + "each_change_is_told_once_and_at_the_time_the_clock_says", "it probes late"),
    Break("K10", LEYLINE + "oona/breaker.py", "        if state is not self.state:\n            self.state = state\n"
          "            self._changed(state)", "        self.state = state\n        self._changed(state)",
          BREAKER + "each_change_is_told_once_and_at_the_time_the_clock_says", "what is no change is told"),
    Break("K10", W + "bus.py", "        if state in self._told:\n            return\n", "",
          WORKERS + "the_breaker_before_redis_is_told_when_it_opens_and_when_it_has_closed",
          "every probe is told as an outage of its own"),
    Break("K14", T + "narrate.py", "return Told(name, level_of(name, Level.WARNING), fields)",
          "return Told(name, Level.WARNING, fields)",
          UNIT + "narrate.py::test_whatever_happens_is_told_at_a_level_of_the_catalogue",
          "a checkpoint that failed is a mere warning"),
    Break("K14", T + "stability.py", "Level.CRITICAL if level >= levels.CONSERVATIVE",
          "Level.CRITICAL if level > levels.CONSERVATIVE",
          UNIT + "standing.py::test_each_emergency_level_is_told_as_bad_as_it_is_and_shown",
          "level 3 does not pass other telemetry"),
    Break("K14", LEYLINE + "events.py", "Level.ERROR: HealthStatus.HEALTH_STATUS_UNHEALTHY",
          "Level.ERROR: HealthStatus.HEALTH_STATUS_DEGRADED",
          EVENTS + "a_level_has_its_priority_and_its_health[ERROR-HIGH-UNHEALTHY]", "an error is a mere degradation"),
    Break("K38", W + "metrics.py", "        if emergency:\n            self._emergency_telemetry.inc()",
          "        if source:\n            self._emergency_telemetry.inc()",
          TELEMETRY + "packets_are_counted_once_by_who_wrote_them_and_by_the_stream_they_are_on",
          "ordinary telemetry counts as urgent"),
    Break("K38", W + "coalesce.py", "        held.count += 1\n", "        held.count = 1\n",
          TELEMETRY + "a_flood_of_equal_events_is_a_handful_of_packets_that_stand_for_all_of_them",
          "repetitions are told without their number"),
    Break("K41", W + "worker.py", "FLUSH_S: Final = 5.0", "FLUSH_S: Final = 50.0",
          WORKERS + "it_starts_and_stops_cleanly_within_ten_seconds[no redis]",
          "it waits for somebody to listen until it is killed"),
    Break("K41", SIDECAR + "supervision.py", "            keeper.cancel()\n", "            keeper.get_name()\n",
          WORKERS + "it_starts_and_stops_cleanly_within_ten_seconds[none]", "workers are left behind"),
    Break("K42", W + "mode.py", "if self._waiting or calm_ns < CALM_S * 1e9:", "if self._waiting:",
          MODE + "a_worker_that_fails_degrades_at_once_and_is_forgiven_after_five_quiet_minutes",
          "a failure is forgotten as soon as it is over"),
    Break("K42", W + "mode.py", "self._recorder.degraded(WEATHERLIGHT, RunReason.WORKER_FAILED, trouble)", "pass",
          WORKERS + "a_worker_that_fails_degrades_the_run_and_is_back_with_what_it_missed",
          "the run's status knows nothing of it"),
    Break("K42", W + "tail.py", "if self._reader.offset > self._recorder.journal_offset:",
          "if self._reader.offset < self._recorder.journal_offset:",
          WORKERS + "a_worker_that_fails_degrades_the_run_and_is_back_with_what_it_missed",
          "what a worker failed on is lost"),
    Break("K59", W + "telemetry.py", "min(offsets, default=self._taken_offset)", "self._taken_offset",
          TELEMETRY + "a_worker_that_is_killed_at_any_time_loses_nothing_and_says_nothing_twice",
          "what waits when it dies is lost"),
    Break("K59", W + "telemetry.py", "            nonce=hashlib.sha256(f\"{identity.run_uid}/{packet_id}\".encode())"
          ".digest()[:16],\n", "",
          TELEMETRY + "a_worker_that_is_killed_at_any_time_loses_nothing_and_says_nothing_twice",
          "what is sent again is another message"),
    Break("K59", W + "worker.py", "            self._telemetry.take_all()\n", "            self._telemetry.take()\n",
          WORKERS + "what_a_run_says_last_is_on_the_bus_before_it_ends", "the end comes before the last words"),
    Break("K65", W + "metrics.py", 'source if source in names.SOURCES else "other", priority', '"other", priority',
          TELEMETRY + "packets_are_counted_once_by_who_wrote_them_and_by_the_stream_they_are_on",
          "nobody knows who said it"),
)
# fmt: on
