"""Piped output: every transition once, progress now and then."""

import io

import pytest
from esper_runtime.cli.live import PROGRESS_EVERY_S, Lines, Table, news, view

A, B, C = ({"time": f"2026-01-01T00:00:0{n}Z", "from": "X", "to": f"P{n}", "reason": "R"} for n in range(3))


def resource(history, step=None):
    progress = (
        None if step is None else {"epoch": 1, "step": step, "totalSteps": 100, "percentage": step, "loss": "1.5"}
    )
    return {"metadata": {"name": "r"}, "status": {"phase": "Running", "history": history, "progress": progress}}


@pytest.mark.parametrize(
    ("before", "after", "new"),
    [
        ([], [A], [A]),
        ([A], [A], []),
        ([A], [A, B], [B]),
        ([A, B], [B, C], [C]),  # the oldest fell off
        ([A, B], [C], [C]),
        ([A], [], []),
    ],
)
def test_news_of_a_bounded_history(before, after, new):
    assert news(before, after) == new


def test_each_transition_is_one_line():
    out = io.StringIO()
    lines = Lines(out)
    for history in ([A], [A], [A, B], [B, C]):
        lines.update(resource(history))
    assert [line.split("  ")[1] for line in out.getvalue().splitlines()] == ["X -> P0", "X -> P1", "X -> P2"]


def test_progress_is_shown_at_most_every_few_seconds():
    out, now = io.StringIO(), [0.0]
    lines = Lines(out, clock=lambda: now[0])
    for second in range(int(2 * PROGRESS_EVERY_S)):
        now[0] = float(second)
        lines.update(resource([], step=second + 1))
    assert [line.split("  ")[-1] for line in out.getvalue().splitlines()] == [
        "epoch 1, step 1/100, 1%, loss 1.5",
        "epoch 1, step 6/100, 6%, loss 1.5",
    ]


def test_a_pipe_gets_lines_and_a_terminal_a_table():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert isinstance(view(io.StringIO()), Lines)
    assert isinstance(view(Terminal()), Table)


def test_the_table_shows_the_run_and_its_transitions(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = io.StringIO()
    table = Table(out)
    with table:
        table.update(resource([A, B], step=7))
        table.note("a warning [not markup]")
    text = out.getvalue()
    assert "PHASE" in text
    assert "X -> P1" in text
    assert "a warning [not markup]" in text
