"""Whatever ends the thread of the Lease reaches the main loop: a process that can no longer lead must end."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from esper_operator.kube.api import LEASES
from esper_operator.kube.errors import Transient
from esper_operator.kube.lease import Elector, LeaseThread
from esper_operator.testing.fakeapi import FakeApi


@pytest.mark.parametrize("error", [KeyError("metadata"), Transient("no answer"), OSError("no file"), TypeError("bug")])
def test_an_error_of_any_kind_is_handed_over(error: Exception) -> None:
    async def make(_: Callable[[], None]) -> tuple[Elector, Callable[[], Awaitable[None]]]:
        raise error

    async def main() -> None:
        lease = LeaseThread(make, on_lost=lambda: None)
        lease.start()
        async with asyncio.timeout(10):
            with pytest.raises(type(error)):
                await lease.failed
        assert not lease.held

    asyncio.run(main())


def test_a_bug_while_leading_is_handed_over_too() -> None:
    class Broken(Elector):
        async def run(self) -> None:
            raise ZeroDivisionError

    async def close() -> None:
        closed.append(True)

    closed: list[bool] = []

    async def make(on_acquired: Callable[[], None]) -> tuple[Elector, Callable[[], Awaitable[None]]]:
        api = FakeApi()
        return Broken(api, namespace="a", name="b", identity="c", on_acquired=on_acquired), close

    async def main() -> None:
        lease = LeaseThread(make, on_lost=lambda: None)
        lease.start()
        async with asyncio.timeout(10):
            with pytest.raises(ZeroDivisionError):
                await lease.failed
        assert closed == [True]

    asyncio.run(main())


def test_a_thread_that_leads_and_is_stopped_gives_the_lease_back() -> None:
    api = FakeApi()

    async def close() -> None: ...

    async def make(on_acquired: Callable[[], None]) -> tuple[Elector, Callable[[], Awaitable[None]]]:
        return Elector(api, namespace="a", name="b", identity="c", on_acquired=on_acquired), close

    async def main() -> None:
        lease = LeaseThread(make, on_lost=lambda: None)
        lease.start()
        async with asyncio.timeout(10):
            await lease.acquired.wait()
        assert lease.held
        assert lease.term == 1
        await lease.stop()
        assert not lease.held
        assert not lease.failed.done()
        lease.failed.cancel()

    asyncio.run(main())
    assert api.all(LEASES)[0]["spec"]["holderIdentity"] == ""
