"""Breaks under the rows of contracts, commands and the emergency path."""

from tests.acceptance.breaking import Break

L, W = "proto/src/esper_leyline/", "runtime/src/esper_runtime/weatherlight/"
K, T = "runtime/src/esper_runtime/kasmina/", "runtime/src/esper_runtime/tolaria/"
O = "operator/src/esper_operator/"  # noqa: E741 - one letter each
LEYLINE, SIDECAR = "tests/unit/leyline/test_", "tests/unit/runtime/sidecar/test_"
FORGED = "tests/unit/runtime/weatherlight/test_forgeries.py::test_"
KASMINA, REPO = "tests/unit/runtime/kasmina/test_", "tests/repo/test_repository.py::test_"
HALTS, BUS = "tests/integration/trainer/test_halts.py::test_", "tests/integration/test_"

# fmt: off
CONTRACTS: tuple[Break, ...] = (
    Break("T07", W + "signals.py", "if record.order < newest_here or (", "if (",
          FORGED + "what_was_said_before_is_refused_or_nothing_new", "an order of before is taken for a slow one"),
    Break("T07", W + "signals.py", "if last is not None and record.order <= last.order:",
          "if last is not None and record.order < last.order:",
          FORGED + "what_was_said_before_is_refused_or_nothing_new", "the last order acts again"),
    Break("T07", L + "signing.py", "        envelope.run_uid.encode(),\n        envelope.key_id.encode(),",
          "        envelope.key_id.encode(),",
          FORGED + "no_beginning_and_no_flipped_bit_of_an_order_acts", "the run is not signed"),
    Break("T07", L + "signing.py",
          '            raise SignatureError("invalid_signature") from error', "            return",
          FORGED + "a_signature_orders_nothing_but_what_it_signed", "a signature need not fit"),
    Break("T07", O + "reports.py", "inbox.verifier.check_envelope(envelope)", "pass",
          "tests/unit/operator/test_reports.py"
          "::test_no_change_to_a_report_that_somebody_without_the_key_can_make_counts", "reports are not verified"),
    Break("T07", K + "verifier.py", "if opened_ns is None:\n            return CommandRejection.UNKNOWN_PACKET",
          "if opened_ns is None:\n            opened_ns = now_ns",
          KASMINA + "verifier.py::test_fresh_means_an_echo_of_a_packet_opened_within_the_window",
          "a command may answer no boundary at all"),

    Break("T28", "runtime/src/esper_runtime/cli/output.py", "class Format(StrEnum):", "class Level(StrEnum):",
          REPO + "no_enum_mirrors_one_of_leyline", "an enumeration of Leyline has a namesake"),
    Break("T28", "proto/esper_leyline/v1/command.proto", "  string rationale = 21;", "  string rationale = 22;",
          "tests/repo/test_generated.py::test_generated_files_are_current", "code and contract differ"),

    Break("T29", L + "oona/consumer.py", "            envelope = _opened(work.entry)\n",
          "            envelope = _opened(work.entry)\n            envelope.priority = 2\n",
          BUS + "oona_consumer.py"
          "::test_a_message_is_the_same_to_its_last_try_as_a_dead_letter_and_when_it_is_replayed[HIGH]",
          "a consumer gives a message another priority"),
    Break("T29", L + "oona/streams.py", "return (EMERGENCY if priority in _URGENT else TELEMETRY,)",
          "return (TELEMETRY,)", LEYLINE + "oona_admission.py::test_type_and_priority_alone_say_where_a_message_goes",
          "what is urgent goes with the rest"),

    Break("T30", K + "verifier.py", "if command.metadata.training_run_id != self.run_uid:",
          'if command.annotations["training_run_id"] != self.run_uid:',
          LEYLINE + "structure.py::test_nobody_reads_what_a_map_once_held", "a map is read"),
    Break("T30", L + "contracts.py", "lowest = rules.min if rules.HasField(\"min\") else -sys.float_info.max",
          "lowest = rules.min if rules.HasField(\"min\") else 1e9",
          LEYLINE + "structure.py::test_every_field_survives_the_wire_and_keeps_its_contract[TrainingMetrics]",
          "measurements within their range are refused"),

    Break("T32", L + "lifecycle.py", "        (_CULLED, _EMBARGOED),\n", "",
          LEYLINE + "lifecycle.py::test_of_144_pairs_of_stages_17_are_steps_each_with_its_gate",
          "a culled seed goes nowhere"),
    Break("T32", L + "lifecycle.py", "(_RESETTING, _DORMANT): pb.SEED_LIFECYCLE_GATE_G5_RESET",
          "(_RESETTING, _DORMANT): pb.SEED_LIFECYCLE_GATE_G0_SANITY",
          LEYLINE + "lifecycle.py::test_every_gate_guards_a_step", "a gate guards nothing"),

    Break("T34", L + "contracts.py", "        return rules.equals, rules.equals\n", "        return 0, 1e18\n",
          LEYLINE + "contracts.py::test_any_other_version_is_refused", "later versions pass"),
    Break("T34", W + "signals.py",
          "SignalRejection.WRONG_VERSION if error.wrong_version else SignalRejection.MALFORMED",
          "SignalRejection.MALFORMED", FORGED + "a_signal_of_another_version_is_refused_as_such",
          "a signal of another version is counted as something else"),

    Break("T35", W + "settings.py", "run_uid=environment.text(env.RUN_UID),",
          'run_uid=environment.text(env.RUN_UID, "unknown"),', SIDECAR + "identity.py::test_no_identity_has_a_default",
          "weatherlight makes a run up"),
    Break("T35", "runtime/src/esper_runtime/sidecar/environment.py", "        if default is None:\n",
          '        if default is None and not name.endswith("UID"):\n',
          SIDECAR + "identity.py::test_a_process_without_its_run_or_attempt_does_not_start",
          "a process does without its run"),
    Break("T35", L + "contracts.py",
          "            plan.required[one.number] = (one.name, _MISSING)\n", "            pass\n",
          LEYLINE + "contracts.py::test_a_missing_identity_is_named", "nothing is required"),

    Break("T36", "runtime/src/esper_runtime/sidecar/http.py", "handler_cancellation=True", "handler_cancellation=False",
          BUS + "given_up.py::test_polls_and_greetings_that_weatherlight_never_gets_to_the_end_of",
          "a poll that was given up holds its place"),
    Break("T36", L + "oona/client.py", "        async with asyncio.timeout(timeout_s):\n            return await call",
          "        async with asyncio.timeout(10 * timeout_s):\n            return await call",
          BUS + "given_up.py::test_the_time_in_a_queue_counts", "callers wait ten times as long"),

    Break("K09", T + "control.py", "if news.signal_id == record.signal_id:", "if news.clear:",
          HALTS + "freeze_stands_still_behind_the_step_that_it_met_until_its_own_id_lifts_it",
          "any lift ends a freeze"),
    Break("K09", T + "loop.py", "        stop = parts.control.poll()\n",
          "        stop = parts.control.poll() if state.step % 5 == 0 else None\n",
          HALTS + "kill_ends_the_run_behind_the_step_that_it_met", "signals are looked at every fifth step"),
    Break("K09", T + "control.py", "if record.mode == EMERGENCY_MODE_CHECKPOINT:", "if record.mode:",
          HALTS + "kill_ends_the_run_behind_the_step_that_it_met", "Kill saves"),
    Break("K09", "runtime/src/esper_runtime/sidecar/emergency.py", "elif record.signal_id == self._halted_by:", "else:",
          SIDECAR + "emergency.py::test_only_its_own_id_lifts_a_halt", "any lift lets a sidecar go on"),

    Break("K11", L + "oona/streams.py", "return (EMERGENCY if priority in _URGENT else TELEMETRY,)",
          "return (EMERGENCY,)", LEYLINE + "oona_admission.py::test_type_and_priority_alone_say_where_a_message_goes",
          "all telemetry is an emergency"),
    Break("K12", L + "oona/streams.py",
          "if priority == pb.MESSAGE_PRIORITY_UNSPECIFIED or priority not in pb.MessagePriority.values():",
          "if priority not in pb.MessagePriority.values():",
          LEYLINE + "oona_admission.py::test_a_message_without_priority_goes_nowhere", "no priority is one"),
    Break("K15", "runtime/src/esper_runtime/cli/output.py", "class Format(StrEnum):", "class Level(StrEnum):",
          REPO + "no_enum_mirrors_one_of_leyline", "an enumeration of Leyline has a namesake"),
    Break("K16", K + "verifier.py", "if command.metadata.training_run_id != self.run_uid:",
          'if command.annotations["training_run_id"] != self.run_uid:',
          LEYLINE + "structure.py::test_nobody_reads_what_a_map_once_held", "a map is read"),
    Break("K16", L + "contracts.py",
          "            plan.required[one.number] = (one.name, _MISSING)\n", "            pass\n",
          LEYLINE + "structure.py::test_a_command_that_says_all_in_annotations_says_nothing",
          "annotations do in place of fields"),
    Break("K17", L + "v1/learning_pb2.py", r"lta\x18\x0e", r"lta\x18\x1e",
          LEYLINE + "contracts.py::test_structured_fields_have_the_numbers_of_the_design", "a field has moved"),

    Break("K27", T + "consult.py", "    if rejection in SUSPECT_COMMANDS:\n        return Level.CRITICAL\n", "",
          "tests/unit/runtime/tolaria/test_consult.py"
          "::test_a_refused_command_is_told_with_its_reason_and_one_that_no_tamiyo_sends_as_critical",
          "a forged command is a mere error"),
    Break("K27", L + "reasons.py", "        CommandRejection.NONCE_REPLAYED,\n", "",
          "tests/unit/runtime/tolaria/test_consult.py"
          "::test_a_refused_command_is_told_with_its_reason_and_one_that_no_tamiyo_sends_as_critical",
          "a replay is a mere error"),
    Break("K28", K + "service.py",
          "        self._metrics.rejections.labels(reason=verdict.rejection.value).inc()\n", "",
          KASMINA + "service.py::test_every_verdict_is_counted_by_reason_and_timed", "refusals are not counted"),
    Break("K28", K + "service.py", "        self._metrics.latency.observe(took_s)\n", "",
          KASMINA + "service.py::test_every_verdict_is_counted_by_reason_and_timed", "verification is not timed"),
    Break("K29", K + "verifier.py", "            return CommandRejection.NONCE_LEDGER_FULL\n",
          "            self._used_ns.popitem(last=False)\n",
          KASMINA + "service.py::test_the_ledger_is_full_at_its_cap_refuses_the_new_and_forgets_nothing_fresh",
          "a fresh nonce gives way to a newer one"),
    Break("K29", K + "service.py", "        self._metrics.boundaries.inc()\n        self._count_ledger()\n",
          "        self._metrics.boundaries.inc()\n",
          KASMINA + "service.py::test_an_idle_ledger_empties_when_its_windows_are_over_and_counts_what_went",
          "nobody looks after an idle ledger"),

    Break("K61", K + "verifier.py", "    except DecodeError:\n", "    except Exception:\n",
          REPO + "broad_excepts_are_nowhere", "whatever goes wrong is malformed"),
    Break("K61", W + "link.py", "contextlib.suppress(ConnectionError)", "contextlib.suppress(Exception)",
          REPO + "nothing_suppresses_whatever_comes", "errors of a connection vanish"),
    Break("K62", W + "emergency.py", "                desk.receive(_decoded(found), CONFIG_MAP)\n", "",
          BUS + "weatherlight.py::test_a_signal_by_the_mounted_file_needs_no_redis", "the mounted file is not heard"),
    Break("K62", W + "emergency.py", "verdict = desk.receive(entry.raw, REDIS)",
          'verdict = desk.receive(b"", REDIS)',
          BUS + "weatherlight.py::test_a_signal_by_redis_is_on_the_page_and_the_supervisor_is_poked",
          "Redis is not heard"),
    Break("K63", O + "build/sidecars.py", '        "restartPolicy": "Always",\n', "",
          "tests/unit/operator/build/test_job.py::test_sidecars_are_native_and_in_order",
          "sidecars are started once, before the trainer"),
)
# fmt: on
