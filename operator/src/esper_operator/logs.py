"""One log format for Kopf, aiohttp and us: JSON lines or text, on stderr."""

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

import orjson
from esper_leyline.incidents import FIELD

run_context: ContextVar[dict[str, object]] = ContextVar("run_context", default={})  # noqa: B039 - never changed in place
"""Fields of the run that is being reconciled: run, namespace, uid, generation."""

_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "settings",
    "k8s_ref",
    "k8s_skip",
}
_QUIET = {"kopf": logging.WARNING, "kopf.objects": logging.WARNING, "kubernetes": logging.WARNING}
"""Kopf says two lines per event; what concerns us it says at WARNING."""


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **run_context.get(),
        }
        fields |= {name: value for name, value in record.__dict__.items() if name not in _OWN}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(fields, default=str).decode()


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        run, incident = run_context.get().get("run"), getattr(record, FIELD, "")
        more = (f" [{run}]" if run else "") + (f" [{FIELD} {incident}]" if incident else "")
        return f"{super().format(record)}{more}"


class _NotOurCase(logging.Filter):
    """Kopf complains that it does not handle OS signals; the main thread does."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("OS signals are ignored")


def configure(*, log_format: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name, quiet in _QUIET.items():
        logging.getLogger(name).setLevel(max(quiet, logging.getLevelName(level)))
    logging.getLogger("kopf._core.reactor.running").addFilter(_NotOurCase())
