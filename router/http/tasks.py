"""Coroutines side by side: several that succeed together, and one that lasts no longer than its client's connection."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from router.http.body import Gone, Receive, Scope

T = TypeVar("T")


async def together(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results, in order. The first that fails cancels the others, and is raised as it is. One alone is no task of its own.

    Not a TaskGroup: in Python 3.11 its exception groups are cycles, and keep what failed, request and all, until they are collected.
    """
    first, *others = jobs
    if not others:
        return [await first]
    tasks = [asyncio.ensure_future(job) for job in (first, *others)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks if task.done() and not task.cancelled() and task.exception() is not None]
        return [task.result() for task in failed or tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # one is raised, the others are nobody's any more


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
