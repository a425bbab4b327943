"""Logging of a sidecar: one JSON object per line for machines, or text for people, on standard error."""

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from esper_leyline import env
from esper_leyline.incidents import FIELD

MAX_MESSAGE: Final = 4096
"""Characters of a message or traceback that are kept."""

_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(component: str, environ: Mapping[str, str]) -> None:
    """Sets up the root logger by ESPER_LOG_FORMAT (json or text; text when unset). Replaces earlier handlers."""
    handler = logging.StreamHandler(sys.stderr)
    if environ.get(env.LOG_FORMAT, "text") == "json":
        handler.setFormatter(JsonFormatter(component))
    else:
        handler.setFormatter(TextFormatter(component))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


class TextFormatter(logging.Formatter):
    """A line for people; the incident that it is about stands at its end."""

    def __init__(self, component: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {component}: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        incident = getattr(record, FIELD, "")
        return super().formatMessage(record) + (f" [{FIELD} {incident}]" if incident else "")


class JsonFormatter(logging.Formatter):
    """time, level, component, logger, message, the record's extra fields, and exception when there is one."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "component": self._component,
            "logger": record.name,
            "message": record.getMessage()[:MAX_MESSAGE],
        }
        document.update({key: value for key, value in record.__dict__.items() if key not in _STANDARD})
        if record.exc_info is not None and record.exc_info[0] is not None:
            # The end of a traceback says most.
            document["exception"] = "".join(traceback.format_exception(*record.exc_info))[-MAX_MESSAGE:]
        return json.dumps(document, ensure_ascii=False, default=str)
