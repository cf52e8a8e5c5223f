"""Idempotency keys: a key runs once at a time, is not run again for a while, and a higher attempt takes it over.

A router answers for the keys of its own requests here; what other routers hold stands in Redis (router/shared_keys.py). A retry says a
higher attempt: it runs, and whoever still runs under the key gives up, since its client has left. A copy of a request says the same
attempt: it is refused while the first one runs and for ten minutes after its end. What was refused or failed leaves no trace.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from router.shared_keys import SharedKeys
from service.errors import OctavoError, Reason

log = logging.getLogger("octavo.router.idempotency")

REMEMBER_SECONDS = 600.0
_MAX_REMEMBERED = 100_000


@dataclass(slots=True, eq=False)
class Claim:
    """Who holds a key. `give_up` ends the holder's request."""

    tenant: str
    key: str
    attempt: int
    give_up: Callable[[OctavoError], None]
    shared: bool = False  # whether other routers know of it


class IdempotencyKeys:
    """The keys of this router. An empty key claims nothing. Owned by the event loop; `now` is a steady clock, in seconds."""

    def __init__(self, now: Callable[[], float], shared: SharedKeys | None = None) -> None:
        self._now = now
        self._shared = shared
        self._claims: dict[tuple[str, str], Claim] = {}
        self._ended: dict[tuple[str, str], tuple[float, int]] = {}  # when, and the attempt; oldest first
        self._releasing: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def claim(self, tenant: str, key: str, attempt: int, give_up: Callable[[OctavoError], None]) -> Claim:
        """Take the key, from a lower attempt if need be. Raises DUPLICATE_REQUEST.

        `give_up` may be called as soon as this has begun.
        """
        claim = Claim(tenant, key, attempt, give_up)
        if not key:
            return claim
        holder = self._claims.get((tenant, key))
        if holder is not None and attempt <= holder.attempt:
            raise _duplicate(key, "is running", holder.attempt)
        self._forget_old()
        _, ended = self._ended.get((tenant, key), (0.0, -1))
        if attempt <= ended:
            raise _duplicate(key, "has run", ended)
        self._claims[tenant, key] = claim
        if holder is not None:
            holder.give_up(took_over(key, attempt))
        if self._shared is not None:
            try:
                if (before := self._releasing.get((tenant, key))) is not None:
                    await asyncio.wait([before])  # or it would take away what we take
                claim.shared = True  # it may be taken though we are cancelled before we hear it
                held = await self._shared.take(tenant, key, attempt)
            except BaseException:
                self.release(claim, ran=False)
                raise
            if held is not None:
                claim.shared = False
                self.release(claim, ran=False)
                raise _duplicate(key, "is running" if held.running else "has run", held.attempt)
        return claim

    def release(self, claim: Claim, *, ran: bool) -> None:
        """The request is over; `ran`: to its end, so that it must not run again. No effect where another attempt holds the key."""
        name = claim.tenant, claim.key
        if self._claims.get(name) is not claim:
            return
        del self._claims[name]
        if ran:
            self._ended.pop(name, None)
            self._ended[name] = (self._now(), claim.attempt)
            self._forget_old()
        if self._shared is not None and claim.shared:
            ttl = REMEMBER_SECONDS if ran else 0.0
            task = asyncio.get_running_loop().create_task(
                self._shared.release(claim.tenant, claim.key, claim.attempt, ttl)
            )
            self._releasing[name] = task
            task.add_done_callback(functools.partial(self._released, name))

    def taken_over(self, tenant: str, key: str, attempt: int) -> None:
        """Another router runs a higher attempt."""
        holder = self._claims.get((tenant, key))
        if holder is not None and holder.attempt < attempt:
            holder.shared = False  # the key is the other's now
            holder.give_up(took_over(key, attempt))

    async def close(self) -> None:
        """Wait until the other routers know what has ended."""
        while self._releasing:
            await asyncio.wait(list(self._releasing.values()))

    def _released(self, name: tuple[str, str], task: asyncio.Task[None]) -> None:
        if self._releasing.get(name) is task:
            del self._releasing[name]
        if not task.cancelled() and (defect := task.exception()) is not None:
            log.error("an idempotency key was not released", exc_info=defect)

    def _forget_old(self) -> None:
        before = self._now() - REMEMBER_SECONDS
        while self._ended:
            name, (ended_at, _) = next(iter(self._ended.items()))
            if ended_at > before and len(self._ended) <= _MAX_REMEMBERED:
                break
            del self._ended[name]


def took_over(key: str, attempt: int) -> OctavoError:
    """How a request ends whose client tries again elsewhere."""
    return OctavoError(Reason.DUPLICATE_REQUEST, f"attempt {attempt} of idempotency_key {key!r} took over")


def _duplicate(key: str, what: str, attempt: int) -> OctavoError:
    return OctavoError(
        Reason.DUPLICATE_REQUEST,
        f"idempotency_key {key!r} {what} as attempt {attempt}; only a higher one may take over",
    )
