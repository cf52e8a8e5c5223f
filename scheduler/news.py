"""What routers are told of their requests: the core's events as messages, each to the router it belongs to. A part of the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from octavo.v1 import common_pb2, scheduler_pb2

from scheduler.core import Scheduler, TokenColumns
from scheduler.outbox import Tokens, select_logprobs
from scheduler.peers import RouterPeer
from service.errors import Reason
from service.logprobs import Logprobs

log = logging.getLogger("octavo.hub")


class News:
    """Takes events out of the core. A router that has left is told nothing: its requests were cancelled."""

    def __init__(self, core: Scheduler, routers: Mapping[int, RouterPeer]) -> None:
        self._core = core
        self._routers = routers

    def tell_all(self, message: Callable[[], scheduler_pb2.AttachResponse]) -> None:
        """A message to each router; each gets its own, because its epoch goes into it."""
        for router in self._routers.values():
            router.put(message())

    def tell_tokens(self, columns: TokenColumns, logprobs: Logprobs | None) -> None:
        """One step's tokens for one router."""
        router = self._routers.get(columns.router_id)
        if router is not None:
            router.put_tokens(Tokens(columns, None if logprobs is None else select_logprobs(logprobs, columns)))

    def tell_placed(self) -> None:
        """Who got a row, and then who gave one up: whoever got it back meanwhile is in the first list only."""
        for admitted in self._core.take_admitted():
            message = scheduler_pb2.Admitted(
                handle=admitted.handle,
                cached_tokens=admitted.cached_tokens,
                digest=admitted.digest,
                queue_ms=int(admitted.queue_seconds * 1e3),
            )
            self._tell(admitted.router_id, scheduler_pb2.AttachResponse(admitted=message))
        for preempted in self._core.take_preempted():
            told = scheduler_pb2.Preempted(handle=preempted.handle)
            self._tell(preempted.router_id, scheduler_pb2.AttachResponse(preempted=told))

    def tell_lost(self) -> None:
        """Who lost a worker, and who is failed."""
        for migrated in self._core.take_migrated():
            message = scheduler_pb2.Migrated(
                handle=migrated.handle, suspect_group=migrated.suspect_group, failures_alone=migrated.failures_alone
            )
            self._tell(migrated.router_id, scheduler_pb2.AttachResponse(migrated=message))
        for failed in self._core.take_failed():
            router = self._routers.get(failed.router_id)
            if router is not None:
                self.refuse(router, failed.handle, Reason[failed.reason.name], failed.message)

    def refuse(self, router: RouterPeer, handle: int, reason: Reason, text: str, retry_after_ms: int = 0) -> None:
        """The end of a request, or the answer to one that was not taken."""
        failed = scheduler_pb2.Failed(
            handle=handle,
            reason=common_pb2.ErrorReason.Name(int(reason)),
            message=text,
            retry_after_ms=retry_after_ms,
        )
        router.put(scheduler_pb2.AttachResponse(failed=failed))

    def _tell(self, router_id: int, message: scheduler_pb2.AttachResponse) -> None:
        router = self._routers.get(router_id)
        if router is not None:
            router.put(message)
