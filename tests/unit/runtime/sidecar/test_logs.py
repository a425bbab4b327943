import json
import logging
import sys

from esper_runtime.sidecar.logs import MAX_MESSAGE, JsonFormatter


def record(message, *args, exc_info=None, **extra):
    made = logging.LogRecord("esper.test", logging.WARNING, __file__, 1, message, args, exc_info)
    made.__dict__.update(extra)
    return made


def formatted(made):
    text = JsonFormatter("weatherlight").format(made)
    assert "\n" not in text
    return json.loads(text)


def test_a_record_becomes_one_json_line_with_its_extra_fields():
    line = formatted(record("worker %d ended", 7, exit_code=137))
    assert (line["level"], line["component"], line["message"], line["exit_code"]) == (
        "warning",
        "weatherlight",
        "worker 7 ended",
        137,
    )


def test_a_traceback_is_kept_inside_the_line():
    try:
        raise ValueError("what went wrong")
    except ValueError:
        line = formatted(record("oops", exc_info=sys.exc_info()))
    assert line["exception"].rstrip().endswith("ValueError: what went wrong")


def test_a_giant_message_is_cut():
    assert len(formatted(record("x" * 100_000))["message"]) == MAX_MESSAGE
