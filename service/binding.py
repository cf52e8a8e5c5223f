"""Addresses that somebody else has: perhaps only for a moment.

A service that is started again wants the port it had. Meanwhile the system may have given it to an outgoing connection of any program,
which mostly is short; so it waits a little, and then ends in a way that has it started again, unless it was told to stop meanwhile
(service/lifecycle.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

from service.settings import SettingsError

T = TypeVar("T")

log = logging.getLogger("octavo")

PATIENCE_SECONDS = 3.0
"""More than the second within which supervisord takes an end for a failure to start, and gives up after a few."""
_RETRY_SECONDS = 0.1


class AddressTaken(SettingsError):
    """Somebody has this address."""


def not_bound(flag: str, listen: str, error: OSError) -> SettingsError:
    """Why `listen` can't be served, in the system's words: by them `make up` knows that a port was taken."""
    # Not `strerror`, which is uvloop's own.
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
    kind = AddressTaken if error.errno == errno.EADDRINUSE else SettingsError
    return kind(f"{flag} {listen}: {reason}")


async def patiently(bind: Callable[[], Awaitable[T]], stopping: asyncio.Event | None = None) -> T:
    """What `bind` returns, tried again while it raises AddressTaken for PATIENCE_SECONDS or until `stopping`, then raised here."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_SECONDS
    told = False
    stopping = stopping or asyncio.Event()
    while True:
        try:
            return await bind()
        except AddressTaken as taken:
            if stopping.is_set() or loop.time() > deadline:
                raise
            if not told:
                log.info("%s; trying for %.0f s", taken, PATIENCE_SECONDS)
                told = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _RETRY_SECONDS)
