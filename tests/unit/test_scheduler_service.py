"""The scheduler's gRPC shell: streams whose peers vanish, or do not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from octavo.v1 import scheduler_pb2, scheduler_pb2_grpc

from scheduler.hub import Hub, HubSettings
from scheduler.service import SchedulerService
from service.errors import OctavoError, Reason, from_rpc_error
from tests.unit.hub_cluster import ROUTER_HELLO
from tests.unit.waiting import eventually

LARGE = scheduler_pb2.ModelList(models=[scheduler_pb2.ServedModel(name="x" * 1_000_000)])


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Hub, Any]]:
    """A hub behind a real server, without its clock; and a stub that talks to it."""
    hub = Hub(HubSettings(), incarnation=1)
    server = grpc.aio.server()
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(SchedulerService(hub, 0.1), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield hub, scheduler_pb2_grpc.SchedulerServiceStub(channel)
    finally:
        await server.stop(0)


def test_a_cut_does_not_wait_for_a_peer_that_does_not_read() -> None:
    async def main() -> None:
        async with served() as (hub, stub):
            call = stub.Attach()
            await call.write(ROUTER_HELLO)
            await eventually(lambda: bool(hub.routers))
            (router,) = hub.routers.values()
            for _ in range(30):  # far more than HTTP/2 lets wait
                router.put(scheduler_pb2.AttachResponse(models=LARGE))
            waiting = -1
            while waiting != len(router.outbox._items):  # until the writer hangs
                waiting = len(router.outbox._items)
                await asyncio.sleep(0.1)
            assert 0 < waiting < 30
            router.cut_off(OctavoError(Reason.LOST, "silent"))
            await eventually(lambda: not hub.routers)
            try:
                while await call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError as error:
                reason = from_rpc_error(error)
            assert reason is not None and reason.reason is Reason.LOST

    asyncio.run(main())


def test_a_peer_that_vanishes_during_hello_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with served() as (hub, stub):
            before = len(asyncio.all_tasks())
            silent, half_closed = stub.Attach(), stub.Enlist()
            await silent.wait_for_connection()
            silent.cancel()
            await half_closed.done_writing()
            assert await half_closed.code() is grpc.StatusCode.FAILED_PRECONDITION
            gone = stub.Attach()
            await gone.write(ROUTER_HELLO)
            gone.cancel()
            await eventually(lambda: not hub.routers and len(asyncio.all_tasks()) <= before)
            assert not hub.workers

    asyncio.run(main())


class EndingContext:
    """A stream whose peer has died: what it said is read, then comes the end; a write takes its time to give up."""

    def __init__(self) -> None:
        self._messages: list[Any] = [ROUTER_HELLO]

    async def read(self) -> Any:
        return self._messages.pop() if self._messages else grpc.aio.EOF

    async def write(self, message: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)

    def peer(self) -> str:
        return "dead"


def test_a_handler_that_is_cancelled_while_it_ends_leaves_nothing_behind() -> None:
    async def main() -> None:
        hub = Hub(HubSettings(), incarnation=1)
        service = SchedulerService(hub, 0.1)
        handler = asyncio.create_task(service.Attach(None, EndingContext()))  # type: ignore[arg-type]
        await asyncio.sleep(0.02)  # the reader has ended; the handler waits for the writer
        handler.cancel()  # as gRPC does when it finds the call gone
        await asyncio.wait([handler], timeout=5)
        assert handler.cancelled()
        assert not hub.routers

    asyncio.run(main())


def test_a_scheduler_that_leaves_is_no_place_to_go() -> None:
    async def main() -> None:
        async with served() as (hub, stub):
            assert not (await stub.ListWorkers(scheduler_pb2.ListWorkersRequest())).workers
            hub.begin_drain(1000)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListWorkers(scheduler_pb2.ListWorkersRequest())
            error = from_rpc_error(caught.value)
            assert error is not None and error.reason is Reason.DRAINING

    asyncio.run(main())
