"""Stands in for Events where a test wants to read what was told."""

from typing import Any, cast

from esper_leyline.events import Level, RunEvent
from esper_runtime.tolaria.telemetry import Events


class Notices:
    """Keeps notices and degradations, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        """(reason, message)."""

    def notice(
        self,
        reason: str,
        message: str,
        *,
        warning: bool = False,
        name: RunEvent | None = None,
        level: Level | None = None,
    ) -> None:
        self.told.append((str(reason), message))

    def degradation(self, component: str, *, degraded: bool, reason: str, message: str) -> None:
        self.told.append((str(reason), message))

    def degraded(self, degradation: Any) -> None:
        self.told.append((degradation.reason, degradation.message))

    def reasons(self) -> list[str]:
        return [reason for reason, _ in self.told]

    @property
    def events(self) -> Events:
        return cast(Events, self)
