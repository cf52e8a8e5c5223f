"""Workers spread over schedulers: one that has two more workers of a model than another one sends a worker there.

After a scheduler was restarted all its workers are at the others, and nothing else would bring them back. Each scheduler decides for
its own workers, from what the others' ListWorkers say. It moves one at a time, and only where that makes the counts more equal: then
schedulers that decide at the same time come to rest.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc
from octavo.v1 import scheduler_pb2, scheduler_pb2_grpc

from scheduler.hub import Hub

log = logging.getLogger("octavo.scheduler.spread")

Counts = Mapping[bytes, int]
"""Workers by model digest, those that are leaving not counted."""

_ASK_SECONDS = 1.0


def choose_move(mine: Counts, elsewhere: Mapping[str, Counts]) -> tuple[bytes, str] | None:
    """The digest of which a worker should go, and the address of the scheduler to go to; None where all is even enough."""
    for digest, count in sorted(mine.items()):
        others = [(counts.get(digest, 0), address) for address, counts in elsewhere.items()]
        if others and count - min(others)[0] >= 2:
            return digest, min(others)[1]
    return None


class Spreader:
    """Asks the other schedulers from time to time. Owned by the event loop."""

    def __init__(
        self,
        hub: Hub,
        open_channel: Callable[[str], grpc.aio.Channel],
        metadata: tuple[tuple[str, str], ...],
        now: Callable[[], float],
    ) -> None:
        """`metadata` proves that we belong to the cluster; `now` is the hub's clock, seconds."""
        self._hub = hub
        self._open_channel = open_channel
        self._metadata = metadata
        self._now = now
        self._peers: frozenset[str] = frozenset()

    def set_peers(self, addresses: Iterable[str]) -> None:
        """These other schedulers exist."""
        self._peers = frozenset(addresses)

    async def run(self, interval: float) -> None:
        """Look each `interval` seconds, more or less, so that schedulers started together don't decide together."""
        while True:
            await asyncio.sleep(interval * random.uniform(0.75, 1.25))
            mine = self._hub.count_workers()
            if self._peers and max(mine.values(), default=0) >= 2:
                self._move(mine, await self._ask())

    def _move(self, mine: Counts, elsewhere: Mapping[str, Counts]) -> None:
        move = choose_move(mine, elsewhere)
        if move is not None:
            self._hub.redial(*move, self._now())

    async def _ask(self) -> dict[str, Counts]:
        peers = sorted(self._peers)
        answers = await asyncio.gather(*(self._count(address) for address in peers))
        return {address: counts for address, counts in zip(peers, answers, strict=True) if counts is not None}

    async def _count(self, address: str) -> Counts | None:
        async with self._open_channel(address) as channel:
            stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            try:
                answer = await stub.ListWorkers(
                    scheduler_pb2.ListWorkersRequest(), metadata=self._metadata, timeout=_ASK_SECONDS
                )
            except grpc.aio.AioRpcError as error:
                log.info("scheduler %s: %s", address, error.details())
                return None
        return Counter(worker.model_digest for worker in answer.workers if not worker.draining)
