"""Of rows that are about times, floods and budgets."""

from tests.acceptance.breaking import Break

OONA = "proto/src/esper_leyline/oona/"
WEATHERLIGHT = "runtime/src/esper_runtime/weatherlight/"
BURST = "tests/integration/test_oona_burst.py::test_"
LEGS = (
    "tests/integration/test_emergency_legs.py::"
    "test_every_leg_alone_brings_an_emergency_to_every_process_in_time_and_it_counts_once"
)

# fmt: off
FIGURES: tuple[Break, ...] = (
    Break("T25", WEATHERLIGHT + "emergency.py", "os.utime(self._page.page.path)", "pass", LEGS,
          "a page that changes wakes no sidecar, which looks a second later"),

    Break("T27", OONA + "admission.py", "        if now is Pressure.HIGH:\n            return Verdict.DROP",
          "        if now is Pressure.HIGH:\n            return Verdict.ADMIT",
          BURST + "critical_is_delivered_at_once_and_once_whatever_normal_does",
          "NORMAL is let through at its limit"),

    Break("T33", "proto/src/esper_leyline/contracts.py", "@cache\ndef _plan", "def _plan",
          "tests/unit/leyline/test_contracts.py::test_serializing_and_checking_keep_their_time",
          "the rules of a message are read anew for each"),

    Break("K08", WEATHERLIGHT + "signals.py", "last is not None and record.order <= last.order:",
          "last is not None and record.order < last.order:", LEGS,
          "a signal that came by both legs counts twice"),

    Break("K13", OONA + "client.py", "lane = self._critical if critical else self._normal", "lane = self._normal",
          BURST + "critical_does_not_wait_for_what_normal_waits_for", "CRITICAL queues behind NORMAL"),

    Break("K39", OONA + "publisher.py", "        async with self._looking:", "        if self._looking:",
          BURST + "above_its_limit_the_backlog_does_not_grow",
          "who sends while the pressure is read sees none"),
    Break("K39", OONA + "admission.py", "return Verdict.REFUSE if message_type in _CONTROL else Verdict.DROP",
          "return Verdict.DROP",
          "tests/unit/leyline/test_oona_admission.py::"
          "test_a_control_message_is_never_dropped_but_refused_under_high_pressure",
          "control messages are dropped"),

    Break("K43", OONA + "streams.py",
          "_URGENT: Final = frozenset({pb.MESSAGE_PRIORITY_HIGH, pb.MESSAGE_PRIORITY_CRITICAL})",
          "_URGENT: Final = frozenset({pb.MESSAGE_PRIORITY_CRITICAL})",
          BURST + "under_load_every_packet_goes_where_its_own_priority_says", "HIGH goes with what is ordinary"),
    Break("K43", OONA + "publisher.py", "            streams = (TELEMETRY,)", "            pass",
          BURST + "under_load_every_packet_goes_where_its_own_priority_says", "HIGH has no rate"),
)
# fmt: on
