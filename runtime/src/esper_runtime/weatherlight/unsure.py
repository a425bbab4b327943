"""What Redis has acknowledged and may yet forget.

It syncs its file once a second, and holds back for up to two more what it has acknowledged while its disk is busy; a
replica that takes over lacks what was on its way. What was acknowledged within FORGETS_S before the newest
acknowledgement is therefore remembered here, to be sent again after an interruption. Readers drop what they have.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from esper_leyline.oona import Oona

FORGETS_S: Final = 5.0
LOOK_S: Final = 1.0
"""How often to ask for it while there is nothing else to send."""
_MAX_ITEMS: Final = 1024

T = TypeVar("T")


class Unsure(Generic[T]):
    """In the order of acknowledgement."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._items: deque[tuple[float, T]] = deque(maxlen=_MAX_ITEMS)
        self._interruptions = 0

    def acknowledged(self, item: T) -> None:
        now = self._clock()
        self._items.append((now, item))
        while self._items[0][0] < now - FORGETS_S:
            self._items.popleft()

    @property
    def oldest(self) -> T | None:
        return self._items[0][1] if self._items else None

    def items(self) -> list[T]:
        return [item for _, item in self._items]

    def forgotten(self, oona: Oona) -> list[T]:
        """All of it when there was an interruption since the last call, else nothing."""
        if oona.interruptions == self._interruptions:
            return []
        self._interruptions = oona.interruptions
        items = [item for _, item in self._items]
        self._items.clear()
        return items
