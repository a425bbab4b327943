"""Columns, documents and descriptions, as a person or a program reads them."""

import json
from datetime import UTC, datetime

import pytest
import yaml
from esper_runtime.cli.output import Format, age, cells, describe, show, table

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


def run(**status):
    return {
        "metadata": {"name": "digits", "namespace": "default", "creationTimestamp": "2026-01-01T11:57:20Z"},
        "spec": {},
        "status": status,
    }


FULL = run(
    phase="Running",
    reason="Training",
    attempt=2,
    progress={"epoch": 3, "step": 120, "percentage": 40, "loss": "0.25", "metrics": [{"name": "a", "value": "0.9"}]},
    rollbacks={"total": 1},
    restarts={"total": 4},
    ranks={"summary": "1/1"},
    checkpoint={"latestVerifiedStep": 100},
)


@pytest.mark.parametrize(
    ("timestamp", "text"),
    [
        ("2026-01-01T11:59:15Z", "45s"),
        ("2026-01-01T11:58:00Z", "2m"),
        ("2026-01-01T11:56:40Z", "3m20s"),
        ("2026-01-01T11:48:00Z", "12m"),
        ("2026-01-01T07:00:00Z", "5h"),
        ("2025-12-20T12:00:00Z", "12d"),
        ("2026-01-01T12:00:05Z", "0s"),
        (None, ""),
    ],
)
def test_ages_are_kubectls(timestamp, text):
    assert age(timestamp, now=NOW) == text


def test_a_row_has_kubectls_columns():
    assert cells(FULL, wide=False, now=NOW) == ["digits", "Running", "3", "120", "40", "2", "1", "1/1", "2m40s"]
    assert cells(FULL, wide=True, now=NOW)[9:] == ["0.25", "100", "4", "Training", ""]


def test_a_new_run_has_empty_columns():
    assert cells({"metadata": {"name": "x"}}, wide=True, now=NOW) == ["x", *[""] * 13]


def test_the_table_is_aligned():
    lines = show([FULL, run(phase="Pending")], Format.TABLE).splitlines()
    assert lines[0].index("EPOCH") == lines[1].index("3  ")
    assert not any(line.endswith(" ") for line in lines)


def test_a_cell_cannot_speak_to_the_terminal():
    shown = table([["\x1b[2Jgone", "a\nb"], ["\x9b31m", "größe"]], ["ONE", "TWO"])
    assert shown.splitlines() == ["ONE        TWO", "\ufffd[2Jgone   a\ufffdb", "\ufffd31m       größe"]


def test_documents_are_whole():
    assert json.loads(show([FULL], Format.JSON, single=True)) == FULL
    assert yaml.safe_load(show([FULL], Format.YAML, single=True)) == FULL
    assert json.loads(show([FULL], Format.JSON))["items"] == [FULL]
    assert show([FULL], Format.NAME) == "espertrainingrun.esper.dev/digits"


def test_a_halt_that_is_over_is_told_as_the_last_one():
    halt = {"mode": "Freeze", "source": "Broadcast", "acknowledged": 1, "expected": 1, "milliseconds": 12}
    assert "\nHalt: Freeze by Broadcast" in describe(run(phase="Halting", halt=halt))
    assert "Last halt: Freeze by Broadcast, 1/1 acknowledged in 12 ms" in describe(run(phase="Running", halt=halt))


def test_a_description_says_what_matters():
    text = describe(
        run(
            phase="Halted",
            halt={"mode": "Checkpoint", "source": "Spec", "acknowledged": 1, "expected": 1, "milliseconds": 85,
                  "savedStep": 42},
            lastRecovery={"kind": "InProcess", "cause": "NonFiniteLoss", "fromStep": 300, "toStep": 290,
                          "recoverMilliseconds": 2},
            lastFailure={"reason": "ContainerDied", "podName": "p", "containerName": "tolaria", "exitCode": 137,
                         "message": "a\nb"},
            conditions=[{"type": "Halted", "status": "True", "reason": "Halted", "message": "m"}],
            history=[{"time": "2026-01-01T11:00:00.250Z", "from": "Running", "to": "Halting", "reason": "R",
                      "attempt": 1, "step": 42}],
        )
    )  # fmt: skip
    assert "Halt: Checkpoint by Spec, 1/1 acknowledged in 85 ms, saved step 42" in text
    assert "Last recovery: InProcess after NonFiniteLoss, step 300 -> 290 in 2 ms" in text
    assert "pod p, container tolaria, exit code 137: a b" in text
    assert ".250   Running   Halting   R" in text
