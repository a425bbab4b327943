"""Ends of asyncio's streams."""

import asyncio
import contextlib

FLUSH_S = 1.0


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Closes the connection and waits until it is gone, with what is unsent after FLUSH_S if its peer does not read."""
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(FLUSH_S):
            await writer.wait_closed()
    writer.transport.abort()
