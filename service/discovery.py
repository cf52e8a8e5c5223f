"""Who is there: leases in Redis, or addresses from settings.

A lease is one key, `octavo:SERVICE:ADDRESS`, with the owner's incarnation in its value and a time to live. The owner renews
it with a script that compares the incarnation, so a process that was suspended cannot overwrite its successor at the same
address. Addresses are hints: identity is proven on connect. When Redis is gone, the last known addresses stay; nothing on the token
path asks it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

import redis.asyncio
from redis.exceptions import RedisError

log = logging.getLogger("octavo.discovery")

LEASE_MS = 3_000
RENEW_SECONDS = 1.0
_CHANGED = "octavo:changed"

_RENEW = """
local held = redis.call('GET', KEYS[1])
if held and cjson.decode(held)['incarnation'] ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return held and 1 or 2
"""
_RELEASE = """
local held = redis.call('GET', KEYS[1])
if held and cjson.decode(held)['incarnation'] == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A process that holds a lease, or an address from settings (incarnation empty)."""

    address: str
    incarnation: str = ""
    name: str = ""


class Registry:
    """Leases in one Redis. Owned by one event loop; every method survives Redis being away."""

    def __init__(self, url: str, on_up: Callable[[bool], None] = lambda up: None) -> None:
        """`on_up` is told whether Redis answers, for a metric."""
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_connect_timeout=2.0, socket_timeout=5.0, decode_responses=True
        )
        self._renew = self._redis.register_script(_RENEW)
        self._release = self._redis.register_script(_RELEASE)
        self._on_up = on_up

    async def hold(self, service: str, peer: Peer, stop: asyncio.Event) -> None:
        """Take the lease over from an earlier incarnation and renew it until `stop`; then release it."""
        key = f"octavo:{service}:{peer.address}"
        value = json.dumps({"address": peer.address, "incarnation": peer.incarnation, "name": peer.name})
        taken = False
        while not stop.is_set():
            try:
                if not taken:
                    await self._redis.set(key, value, px=LEASE_MS)
                    await self._redis.publish(_CHANGED, service)
                    taken = True
                elif await self._renew(keys=[key], args=[peer.incarnation, value, LEASE_MS]) == 0:
                    log.error("another process took over the address %s; no longer announcing it", peer.address)
                    return
                self._on_up(True)
            except (RedisError, OSError) as error:
                self._on_up(False)
                log.warning("redis: %s; discovery stays as it was", error)
            await _sleep_or_stop(RENEW_SECONDS, stop)
        try:
            await self._release(keys=[key], args=[peer.incarnation])
            await self._redis.publish(_CHANGED, service)
        except (RedisError, OSError) as error:
            log.warning("redis: %s; the lease of %s runs out by itself", error, peer.address)

    async def watch(self, service: str, changed: Callable[[frozenset[Peer]], None]) -> None:
        """Call `changed` with all peers of a service whenever they change. Runs until cancelled."""
        known: frozenset[Peer] | None = None
        loop = asyncio.get_running_loop()
        trusted_from = 0.0
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as events:
                    await events.subscribe(_CHANGED)
                    while True:
                        peers = await self._list(service)
                        raise_swallowed_cancel()
                        self._on_up(True)
                        if known is not None and loop.time() < trusted_from:
                            peers |= known  # a Redis that has just come back may not know its leases yet
                        if peers != known:
                            known = peers
                            changed(peers)
                        # A message makes it quick; the timeout finds leases that ran out.
                        await events.get_message(timeout=RENEW_SECONDS)
                        raise_swallowed_cancel()
            except (RedisError, OSError) as error:
                self._on_up(False)
                log.warning("redis: %s; discovery stays as it was", error)
                await asyncio.sleep(RENEW_SECONDS)
                trusted_from = loop.time() + LEASE_MS / 1e3

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _list(self, service: str) -> frozenset[Peer]:
        keys = [key async for key in self._redis.scan_iter(match=f"octavo:{service}:*", count=100)]
        values = await self._redis.mget(keys) if keys else []
        peers = set()
        for value in values:
            if value is not None:
                found = json.loads(value)
                peers.add(Peer(found["address"], found["incarnation"], found["name"]))
        return frozenset(peers)


def raise_swallowed_cancel() -> None:
    """redis-py loses a cancellation that comes together with a message or an answer (seen with 8.1): raise it here."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _sleep_or_stop(seconds: float, stop: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass
