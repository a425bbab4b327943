"""One thread that works beside its owner: it hashes what the owner copies.

Copy and hash are each bound by memory that one core can move; on two cores they take no longer than the longer one.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

WORTH_BYTES: Final = 8 * 1024 * 1024
"""Below this, waking another thread costs as much as it saves."""
T = TypeVar("T")
log = logging.getLogger(__name__)


class Beside:
    """Makes the thread with the first piece of work; it ends with its owner."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def start(self, work: Callable[[], T]) -> "Future[T]":
        """Work that runs outside of Python's lock, as must what the caller does meanwhile.

        At a limit of threads it is done before this returns, and the next call tries again.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot-hash")
        try:
            return self._pool.submit(work)
        except RuntimeError as error:
            log.warning("no thread to hash a snapshot beside its copy: %s", error)
            self._pool = None  # with what it could not begin
            done: Future[T] = Future()
            done.set_result(work())
            return done

    def close(self) -> None:
        """Waits for work under way. It may be used again afterwards."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
