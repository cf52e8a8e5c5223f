"""Coroutines side by side: several that succeed together, and one that lasts no longer than its client's connection."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from router.http.body import Gone, Receive, Scope
from router.http.errors import HttpError
from service.errors import OctavoError

T = TypeVar("T")


async def together(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results, in order. The first that fails cancels the others, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except* (OctavoError, HttpError) as failed:
        error: BaseException = failed
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    return [task.result() for task in tasks]


async def while_connected(scope: Scope, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises; cancelled as soon as the client hangs up, which raises Gone. The body has been read.

    Work that is cancelled by others goes on for another connection: then this one is hung up on.
    """
    running = asyncio.ensure_future(work)
    closed = asyncio.ensure_future(_closed(receive))
    try:
        await asyncio.wait((running, closed), return_when=asyncio.FIRST_COMPLETED)
        if running.cancelled():
            scope["extensions"]["octavo.abort"]()
            await closed
        if not running.done() or running.cancelled():
            raise Gone
        return running.result()
    finally:
        for task in (running, closed):
            task.cancel()
        await asyncio.wait((running, closed))
        if not running.cancelled():
            running.exception()  # nobody is there to be told


async def _closed(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
