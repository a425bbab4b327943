"""Piped output: every transition once, progress now and then."""

import errno
import io

import pytest
from esper_runtime.cli.live import PROGRESS_EVERY_S, SHOWN, Lines, Table, news, progress, view
from esper_runtime.cli.output import fitting

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
    assert [line[14:] for line in out.getvalue().splitlines()] == ["X -> P0  (R)", "X -> P1  (R)", "X -> P2  (R)"]


def test_what_was_before_is_not_repeated():
    out = io.StringIO()
    lines = Lines(out, known=[A])
    lines.update(resource([A, B]))
    assert [line[14:] for line in out.getvalue().splitlines()] == ["X -> P1  (R)"]


def test_progress_is_shown_at_most_every_few_seconds():
    out, now = io.StringIO(), [0.0]
    lines = Lines(out, clock=lambda: now[0])
    for second in range(int(2 * PROGRESS_EVERY_S)):
        now[0] = float(second)
        lines.update(resource([], step=second + 1))
    assert [line.split("  ")[-1] for line in out.getvalue().splitlines()] == [
        "epoch 1, step 1/100 (1%), loss 1.5",
        "epoch 1, step 6/100 (6%), loss 1.5",
    ]


def test_before_the_first_step_there_is_no_progress():
    out = io.StringIO()
    Lines(out).update(resource([], step=0))
    assert out.getvalue() == ""


def test_progress_says_what_there_is_to_say():
    status = {
        "phase": "Running",
        "progress": {
            "epoch": 2, "totalEpochs": 9, "step": 20, "totalSteps": 90, "percentage": 22, "loss": "0.5",
            "estimatedRemainingSeconds": 200,
            "metrics": [{"name": "validation_accuracy", "value": "0.9"}, {"name": "train_loss", "value": "1"}],
        },
    }  # fmt: skip
    assert progress({"status": status}) == (
        "epoch 2/9, step 20/90 (22%), loss 0.5, validation_accuracy 0.9, 3m20s left"
    )
    assert "left" not in progress({"status": {**status, "phase": "Halted"}})


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


@pytest.mark.parametrize("width", [20, 40, 60, 79, 200])
def test_a_narrow_terminal_gets_fewer_columns_and_the_ones_that_matter(width):
    row = dict.fromkeys(SHOWN, "12345")
    shown = fitting(row, width, gap=2)
    assert list(shown)[:2] == ["NAME", "PHASE"]
    assert list(shown) == [column for column in SHOWN if column in shown]
    assert (list(shown) == list(SHOWN)) == (width == 200)
    assert sum(max(len(c), 5) for c in shown) + 2 * (len(shown) - 1) <= width


def test_a_table_in_a_narrow_terminal_keeps_to_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = io.StringIO()
    with Table(out) as table:
        table.update(resource([A, B], step=7))
    assert max(len(line) for line in out.getvalue().splitlines()) <= 40


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_nobody_to_read_is_no_error(terminal):
    stream = Gone()
    stream.terminal = terminal
    with view(stream) as shown:
        shown.update(resource([A], step=5))
        shown.note("words")


def test_a_full_disk_behind_a_redirection_is_an_error():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        view(Full()).note("words")
