"""Leases on a real redis-server: taken, renewed, fenced by incarnation, found, lost; and Redis going away and coming back."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from deploy.member import Member
from service.discovery import LEASE_MS, Peer, Registry


async def until(condition: asyncio.Event, seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        await condition.wait()


class Watcher:
    """Collects what `watch` reports."""

    def __init__(self) -> None:
        self.peers: frozenset[Peer] = frozenset()
        self.changed = asyncio.Event()

    def __call__(self, peers: frozenset[Peer]) -> None:
        self.peers = peers
        self.changed.set()

    async def next(self) -> frozenset[Peer]:
        await until(self.changed)
        self.changed.clear()
        return self.peers


def test_a_lease_is_found_taken_over_by_a_new_incarnation_and_released(redis_server: Member) -> None:
    async def scenario() -> None:
        registry = Registry(redis_server.address)
        watcher, stop_old, stop_new = Watcher(), asyncio.Event(), asyncio.Event()
        watch = asyncio.create_task(registry.watch("scheduler", watcher))
        assert await watcher.next() == frozenset()
        old, new = Peer("127.0.0.1:9", "1", "old"), Peer("127.0.0.1:9", "2", "new")
        first = asyncio.create_task(registry.hold("scheduler", old, stop_old))
        assert await watcher.next() == {old}
        second = asyncio.create_task(registry.hold("scheduler", new, stop_new))
        assert await watcher.next() == {new}
        # The old process's renewal finds itself fenced off and gives up; the new lease stays.
        async with asyncio.timeout(10):
            await first
        assert watcher.peers == {new}
        stop_new.set()
        await second
        assert await watcher.next() == frozenset()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await registry.close()

    asyncio.run(scenario())


def test_a_lease_that_is_not_renewed_runs_out(redis_server: Member) -> None:
    async def scenario() -> None:
        registry, watcher = Registry(redis_server.address), Watcher()
        watch = asyncio.create_task(registry.watch("router", watcher))
        await watcher.next()
        hold = asyncio.create_task(registry.hold("router", Peer("127.0.0.1:8", "1", "r"), asyncio.Event()))
        assert len(await watcher.next()) == 1
        hold.cancel()  # as if the process had been killed
        async with asyncio.timeout(LEASE_MS / 1e3 + 10):
            assert await watcher.next() == frozenset()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await registry.close()

    asyncio.run(scenario())


def test_while_redis_is_away_nobody_is_forgotten(redis_server: Member) -> None:
    async def scenario() -> None:
        ups: list[bool] = []
        down, up = asyncio.Event(), asyncio.Event()

        def on_up(value: bool) -> None:
            ups.append(value)
            (up if value else down).set()

        registry, watcher, stop = Registry(redis_server.address, on_up), Watcher(), asyncio.Event()
        watch = asyncio.create_task(registry.watch("scheduler", watcher))
        await watcher.next()
        peer = Peer("127.0.0.1:7", "1", "s")
        hold = asyncio.create_task(registry.hold("scheduler", peer, stop))
        assert await watcher.next() == {peer}
        await asyncio.to_thread(redis_server.kill)
        await until(down)
        assert watcher.peers == {peer}
        assert not watcher.changed.is_set()
        up.clear()
        await asyncio.to_thread(redis_server.start)
        await until(up)
        # The empty Redis learns of the lease again from its owner, and nobody saw it missing.
        await asyncio.sleep(LEASE_MS / 1e3 + 2)
        assert not watcher.changed.is_set()
        stop.set()
        await hold
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await registry.close()

    asyncio.run(scenario())
