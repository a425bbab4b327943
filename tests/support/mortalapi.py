"""A KubeApi that dies at a chosen request, before or after it took effect: the operator is killed there."""

import asyncio
from typing import Any

from esper_operator.kube.api import KubeApi

from tests.support.wrappedapi import WrappedApi


class Killed(BaseException):
    """The process is gone; nothing may catch this and go on."""


class MortalApi(WrappedApi):
    """Counts get, create, apply, apply_status, patch and delete; the stream of runs and lists never kills."""

    def __init__(self, api: KubeApi, *, dies_at: int | None = None, after: bool = False) -> None:
        super().__init__(api)
        self._dies_at = dies_at
        self._after = after
        self.count = 0
        self.died = asyncio.Event()

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.died.is_set():
            raise Killed
        self.count += 1
        fatal = self.count == self._dies_at
        if fatal and not self._after:
            self.died.set()
            raise Killed
        try:
            return await getattr(self._api, name)(*args, **kwargs)
        finally:
            if fatal:
                self.died.set()
                raise Killed
