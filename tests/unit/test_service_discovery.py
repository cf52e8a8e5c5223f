"""Discovery without a Redis. With one: tests/integration/test_discovery.py."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Self

import pytest

from service.discovery import Peer, Registry


class Quiet:
    """A subscription on which nothing comes."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def subscribe(self, channel: str) -> None:
        pass

    async def get_message(self, timeout: float) -> None:
        await asyncio.Event().wait()


def test_a_cancellation_that_redis_py_loses_while_it_lists_ends_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to wait for the next message first: a second, in which a process that was to end said nothing to its peers."""

    async def main() -> None:
        listing = asyncio.Event()

        async def list_peers(service: str) -> frozenset[Peer]:
            listing.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return frozenset()

        registry = Registry("redis://127.0.0.1:1/0")
        subscription: Any = lambda **_: Quiet()  # noqa: E731
        monkeypatch.setattr(registry._redis, "pubsub", subscription)
        monkeypatch.setattr(registry, "_list", list_peers)
        watch = asyncio.create_task(registry.watch("scheduler", lambda peers: None))
        await listing.wait()
        watch.cancel()
        done, _ = await asyncio.wait([watch], timeout=10)
        assert done and watch.cancelled()
        await registry.close()

    asyncio.run(main())
