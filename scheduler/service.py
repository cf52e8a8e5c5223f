"""The gRPC shell of the scheduler: streams in and out of the hub. No decision is taken here.

Everything runs on one event loop. A handler feeds messages to the hub as they come; one writer a stream sends what its outbox holds;
plans are composed once for all messages that came in one turn of the loop. The hub never waits for a stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError
from octavo.v1 import scheduler_pb2, scheduler_pb2_grpc

from scheduler import inspect
from scheduler.hub import Hub
from scheduler.peers import Peer
from service.errors import OctavoError, Reason, abort
from service.trace import Trace

log = logging.getLogger("octavo.scheduler")

_HELLO_SECONDS = 5.0
_MAX_INSPECT_HZ = 50
_FAREWELL_SECONDS = 1.0

P = TypeVar("P", bound=Peer)


class _Takes(Protocol):
    def take(self, now: float) -> Any: ...


class SchedulerService(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Attach, Enlist, assets and the admin methods over one hub."""

    def __init__(self, hub: Hub, tick_s: float) -> None:
        self.hub = hub
        self._tick_s = tick_s
        self._plan_due = False
        self._started_at = self._now()

    async def tick_forever(self) -> None:
        """Heartbeats, leases, deadlines; runs until cancelled."""
        while True:
            await asyncio.sleep(self._tick_s)
            self.hub.tick(self._now())
            self._plan_soon()

    async def Attach(  # type: ignore[override]  # grpc.aio's read/write style: no generator
        self, request_iterator: AsyncIterator[scheduler_pb2.AttachRequest], context: Any
    ) -> None:
        """A router's stream."""
        hello = await self._hello(context, "hello")
        router = await self._admit(context, lambda: self.hub.attach(hello, self._now()))

        def on_message(message: scheduler_pb2.AttachRequest) -> None:
            self.hub.on_router(router, message, self._now())

        def gone() -> None:
            self.hub.router_gone(router, self._now())

        await self._serve(context, router, router, on_message, gone)

    async def Enlist(  # type: ignore[override]  # as Attach
        self, request_iterator: AsyncIterator[scheduler_pb2.EnlistRequest], context: Any
    ) -> None:
        """A worker's stream: its lease."""
        hello = await self._hello(context, "hello")
        worker = await self._admit(context, lambda: self.hub.enlist(hello, self._now()))

        def on_message(message: scheduler_pb2.EnlistRequest) -> None:
            self.hub.on_worker(worker, message, self._now())

        def gone() -> None:
            self.hub.worker_gone(worker, self._now())

        await self._serve(context, worker, worker, on_message, gone)

    async def FetchAssets(
        self, request: scheduler_pb2.FetchAssetsRequest, context: Any
    ) -> AsyncIterator[scheduler_pb2.FetchAssetsResponse]:
        """A model's files in pieces of 1 MiB."""
        try:
            chunks = self.hub.assets.chunks(request.digest)
        except OctavoError as error:
            await abort(context, error)
        for chunk in chunks:
            yield scheduler_pb2.FetchAssetsResponse(chunk=chunk)

    async def ListWorkers(
        self, request: scheduler_pb2.ListWorkersRequest, context: Any
    ) -> scheduler_pb2.ListWorkersResponse:
        """The workers that are enlisted. A scheduler that leaves says so: nobody should come to it."""
        if self.hub.draining:
            await abort(context, OctavoError(Reason.DRAINING, "this scheduler is leaving"))
        return scheduler_pb2.ListWorkersResponse(workers=inspect.list_workers(self.hub))

    async def DrainWorker(
        self, request: scheduler_pb2.DrainWorkerRequest, context: Any
    ) -> scheduler_pb2.DrainWorkerResponse:
        """Give a worker no new requests; it leaves when the running ones are done."""
        found = [w for w in self.hub.workers.values() if w.hello.incarnation == request.incarnation]
        if not found:
            error = OctavoError(Reason.INVALID_ARGUMENT, f"no worker has incarnation {request.incarnation}")
            await abort(context, error)
        self.hub.drain_worker(found[0])
        return scheduler_pb2.DrainWorkerResponse()

    async def AdmitDigest(
        self, request: scheduler_pb2.AdmitDigestRequest, context: Any
    ) -> scheduler_pb2.AdmitDigestResponse:
        """Allow a further digest under a model name."""
        if not request.model or len(request.digest) != 32:
            await abort(context, OctavoError(Reason.INVALID_ARGUMENT, "a model and a digest of 32 bytes are needed"))
        self.hub.admit_digest(request.model, request.digest)
        return scheduler_pb2.AdmitDigestResponse()

    async def Inspect(
        self, request: scheduler_pb2.InspectRequest, context: Any
    ) -> AsyncIterator[scheduler_pb2.InspectResponse]:
        """The queue, the plans and the block tables, live."""
        period = 1.0 / min(request.max_hz or 2, _MAX_INSPECT_HZ)
        last = inspect.inspect(self.hub, request, self._uptime_ms())
        yield last
        while not request.once:
            await asyncio.sleep(period)
            new = inspect.inspect(self.hub, request, self._uptime_ms())
            yield inspect.only_changes(new, last)
            last = new

    async def _hello(self, context: Any, kind: str) -> Any:
        """The first message of a stream, which must be a Hello."""
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                first = await context.read()
        except TimeoutError:
            await abort(context, OctavoError(Reason.PROTOCOL_VIOLATION, f"no Hello within {_HELLO_SECONDS:.0f} s"))
        except DecodeError:
            await abort(context, OctavoError(Reason.PROTOCOL_VIOLATION, "a stream starts with Hello"))
        if first is grpc.aio.EOF or first.WhichOneof("message") != kind:
            await abort(context, OctavoError(Reason.PROTOCOL_VIOLATION, "a stream starts with Hello"))
        return getattr(first, kind)

    async def _admit(self, context: Any, admit: Callable[[], P]) -> P:
        try:
            return admit()
        except OctavoError as error:
            log.warning("refused %s: %s", context.peer(), error.message)
            await abort(context, error)

    async def _serve(
        self, context: Any, peer: Peer, source: _Takes, on_message: Callable[[Any], None], gone: Callable[[], None]
    ) -> None:
        """Carry messages both ways until either side ends; then take the peer off the books, whatever happened."""
        wake = asyncio.Event()
        cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def notify() -> None:
            wake.set()
            if peer.cut is not None and not cut.done():
                cut.set_result(None)

        peer.notify = notify
        reader = asyncio.create_task(self._read(context, peer, on_message), name=f"read {peer.name}")
        writer = asyncio.create_task(self._write(context, peer, source, wake), name=f"write {peer.name}")
        self._plan_soon()
        notify()
        try:
            # A cut is waited for as well: the writer may hang in a stream that its peer does not read.
            waiting: list[asyncio.Future[None]] = [reader, writer, cut]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Before anything is awaited: gRPC may cancel this handler once more, and a peer must not stay on the books.
            gone()
            self._plan_soon()
            reader.cancel()
            try:
                # gRPC takes no status while a message is under way: to a peer that reads, it is for a moment only.
                peer.closing = True
                wake.set()
                await asyncio.wait([writer], timeout=_FAREWELL_SECONDS)
            finally:
                writer.cancel()
                results = await asyncio.gather(reader, writer, return_exceptions=True)
        broken = next((result for result in results if isinstance(result, OctavoError)), None)
        cause = peer.cut or broken
        if cause is not None:
            log.warning("cut off %s: %s", peer.name, cause.message)
            try:
                await abort(context, OctavoError(cause.reason, f"cut off: {cause.message}"))
            except grpc.aio.InternalError:
                # It does not read, and is off the books; its own lease or the connection's keepalive ends its side.
                log.info("%s can't be told: it does not read", peer.name)
                raise asyncio.CancelledError from None
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, grpc.aio.AioRpcError | grpc.aio.BaseError):
                raise result

    async def _read(self, context: Any, peer: Peer, on_message: Callable[[Any], None]) -> None:
        while True:
            try:
                message = await context.read()
            except DecodeError as error:
                raise OctavoError(Reason.PROTOCOL_VIOLATION, f"bytes that are no message: {error}") from None
            if message is grpc.aio.EOF or peer.cut is not None:
                return
            on_message(message)
            self._plan_soon()

    async def _write(self, context: Any, peer: Peer, source: _Takes, wake: asyncio.Event) -> None:
        while True:
            await wake.wait()
            wake.clear()
            trace = self.hub.trace
            began = trace.now() if trace is not None else 0
            while peer.cut is None and (message := source.take(self._now())) is not None:
                taken = trace.now() if trace is not None else 0
                await context.write(message)
                if trace is not None:
                    began = _note_sent(trace, message, began, taken)
            if peer.closing:
                return

    def _plan_soon(self) -> None:
        if not self._plan_due:
            self._plan_due = True
            asyncio.get_running_loop().call_soon(self._plan)

    def _plan(self) -> None:
        self._plan_due = False
        if self.hub.plan(self._now()):
            self._plan_soon()  # behind the writers, which these plans have woken

    def _now(self) -> float:
        return time.monotonic()  # uvloop's clock stands still within a turn of the loop

    def _uptime_ms(self) -> int:
        return int((self._now() - self._started_at) * 1e3)


def _note_sent(
    trace: Trace, message: scheduler_pb2.AttachResponse | scheduler_pb2.EnlistResponse, began: int, taken: int
) -> int:
    """The spans of a message that was encoded from `began` to `taken` and written since. Returns when it was."""
    written = trace.now()
    kind = message.WhichOneof("message")
    if isinstance(message, scheduler_pb2.EnlistResponse) and kind == "plan":
        trace.add("send plan", message.plan.step_id, taken, written)
    elif kind == "tokens":
        trace.add("encode tokens", 0, began, taken)
        trace.add("send tokens", 0, taken, written)
    return written
