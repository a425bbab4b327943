"""The dashboards."""

from esper_runtime.nissa.dashboards.overview import OVERVIEW
from esper_runtime.nissa.dashboards.run import RUN
from esper_runtime.nissa.model import Dashboard, Panel

DASHBOARDS: dict[str, Dashboard] = {"overview": OVERVIEW, "run": RUN}
"""By the names of their files."""


def panel(key: str) -> Panel:
    """Of `<dashboard>/<panel>`; KeyError when there is none."""
    name, _, wanted = key.partition("/")
    found = {each.key: each for each in DASHBOARDS[name].panels}
    return found[wanted]
