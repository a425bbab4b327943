"""pytest plugin: writes the outcome of every test that shows an acceptance row, one JSON object a line.

`pytest -p tests.acceptance.plugin --acceptance FILE`; works with xdist, whose workers carry the rows along.
"""

import json
from pathlib import Path

import pytest

from tests.acceptance.rows import BY_ID

_ROWS = "acceptance rows"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--acceptance", metavar="FILE", help="append outcomes of tests with acceptance rows to FILE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        rows = [row for mark in item.iter_markers("row") for row in mark.args]
        unknown = [row for row in rows if row not in BY_ID]
        if unknown:
            raise pytest.UsageError(f"{item.nodeid}: no acceptance row {', '.join(unknown)}")
        if rows:
            item.user_properties.append((_ROWS, rows))


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        rows = dict(report.user_properties).get(_ROWS)
        if rows is None or not (report.when == "call" or report.outcome != "passed"):
            return
        why = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
        line = {"test": report.nodeid, "rows": rows, "outcome": report.outcome, "why": why}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--acceptance", default=None)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(Path(path)))
