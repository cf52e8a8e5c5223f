"""Idempotency keys that all routers of a cluster share, in Redis.

One entry a key: which router (address and incarnation), which attempt, whether it runs. A claim is one script, so of two routers one
wins. Who holds a lease no more (service/discovery.py) holds no key either. A holder that loses its key to a higher attempt hears of it
on a channel of its own. Where Redis does not answer, each router answers for its own keys alone: better run twice than lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from service.discovery import Peer, raise_swallowed_cancel

log = logging.getLogger("octavo.router.shared_keys")

# Of a key that runs, milliseconds: only garbage collection, since a dead router's keys are worth nothing.
_RUNNING_MS = 24 * 3_600_000
_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 0.25
_MAX_CONNECTIONS = 16

_TAKE = """
local held = redis.call('GET', KEYS[1])
if held then
  local claim = cjson.decode(held)
  local lease = redis.call('GET', 'octavo:router:' .. claim.address)
  local lives = lease and cjson.decode(lease).incarnation == claim.incarnation
  local mine = claim.incarnation == ARGV[2]
  if tonumber(ARGV[1]) <= claim.attempt then
    if not claim.running or (lives and not mine) then return held end
    if mine and tonumber(ARGV[1]) < claim.attempt then return held end
  elseif claim.running and lives and not mine then
    redis.call('PUBLISH', 'octavo:takeover:' .. claim.incarnation, ARGV[4])
  end
end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[5])
return false
"""
_RELEASE = """
local held = redis.call('GET', KEYS[1])
if not held then return 0 end
local claim = cjson.decode(held)
if claim.incarnation ~= ARGV[1] or claim.attempt ~= tonumber(ARGV[2]) then return 0 end
if tonumber(ARGV[4]) == 0 then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4]) end
return 1
"""


@dataclass(frozen=True, slots=True)
class Held:
    """What another router has of a key."""

    attempt: int
    running: bool


class SharedKeys:
    """The keys in Redis as one router sees them. Owned by one event loop; no method fails because Redis is away."""

    def __init__(self, url: str, me: Peer, on_alone: Callable[[], None] = lambda: None) -> None:
        """`me`: as the router's lease says. `on_alone` is called for each claim that Redis did not answer, for a metric."""
        # Requests wait for it, so not for long; and a burst of them must not open a connection each.
        self._redis = redis.asyncio.Redis.from_pool(
            redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=_ANSWER_SECONDS,
                socket_connect_timeout=_ANSWER_SECONDS,
                socket_timeout=_ANSWER_SECONDS,
                decode_responses=True,
            )
        )
        self._events = redis.asyncio.Redis.from_url(url, socket_connect_timeout=2.0, decode_responses=True)
        self._take = self._redis.register_script(_TAKE)
        self._release = self._redis.register_script(_RELEASE)
        self._me = me
        self._on_alone = on_alone

    async def take(self, tenant: str, key: str, attempt: int) -> Held | None:
        """Claim a key; who holds it where that can't be, else None."""
        takeover = json.dumps({"tenant": tenant, "key": key, "attempt": attempt})
        args: list[str | int] = [
            attempt,
            self._me.incarnation,
            self._claim(attempt, running=True),
            takeover,
            _RUNNING_MS,
        ]
        try:
            held = await self._take(keys=[_name(tenant, key)], args=args)
        except (RedisError, OSError) as error:
            self._on_alone()
            log.warning("redis: %s; an idempotency key is known to this router alone", error)
            return None
        if not held:
            return None
        found = json.loads(held)
        return Held(int(found["attempt"]), bool(found["running"]))

    async def release(self, tenant: str, key: str, attempt: int, remember_seconds: float) -> None:
        """The request is over. 0 seconds: as if it had never been."""
        ended = self._claim(attempt, running=False)
        args: list[str | int] = [self._me.incarnation, attempt, ended, round(remember_seconds * 1e3)]
        try:
            await self._release(keys=[_name(tenant, key)], args=args)
        except (RedisError, OSError) as error:
            log.warning("redis: %s; an idempotency key stays with this router while it lives", error)

    async def listen(self, taken_over: Callable[[str, str, int], None]) -> None:
        """Call `taken_over` with tenant, key and attempt when another router takes a key of ours. Runs until cancelled."""
        while True:
            try:
                async with self._events.pubsub(ignore_subscribe_messages=True) as events:
                    await events.subscribe(f"octavo:takeover:{self._me.incarnation}")
                    while True:
                        message: dict[str, Any] | None = await events.get_message(timeout=_POLL_SECONDS)
                        raise_swallowed_cancel()
                        if message is not None:
                            said = json.loads(message["data"])
                            taken_over(said["tenant"], said["key"], int(said["attempt"]))
            except (RedisError, OSError) as error:
                log.info("redis: %s; takeovers at other routers are not heard of", error)
                await asyncio.sleep(_POLL_SECONDS)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()
        await self._events.aclose()

    def _claim(self, attempt: int, *, running: bool) -> str:
        claim = {"incarnation": self._me.incarnation, "address": self._me.address}
        return json.dumps(claim | {"attempt": attempt, "running": running})


def _name(tenant: str, key: str) -> str:
    return "octavo:key:" + hashlib.sha256(json.dumps([tenant, key]).encode()).hexdigest()
