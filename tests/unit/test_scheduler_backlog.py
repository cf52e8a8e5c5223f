"""What a router that is behind leaves waiting: at the scheduler, where it is merged, and not in gRPC."""

from __future__ import annotations

import asyncio
from collections import deque

import grpc
import numpy as np
from octavo.v1 import scheduler_pb2, scheduler_pb2_grpc

from router.__main__ import _ATTACH_WINDOW_BYTES
from router.hub import ClientStream
from router.hub import Hub as RouterHub
from router.session import RouterSession, SessionSettings
from scheduler.core.plan import TokenColumns
from scheduler.hub import Hub, HubSettings
from scheduler.outbox import RouterOutbox, Tokens
from scheduler.service import SchedulerService
from service.server import open_channel
from service.settings import CommonSettings
from tests.unit.hub_cluster import ROUTER_HELLO
from tests.unit.waiting import eventually

ROWS = 256


def tokens(step: int) -> Tokens:
    """One token for each of 256 rows."""
    column = np.full(ROWS, step, np.int32)
    one = np.ones(ROWS, np.int32)
    columns = TokenColumns(
        2, np.arange(ROWS), column, one, np.zeros(ROWS, np.uint8), column, np.arange(ROWS, dtype=np.int32)
    )
    return Tokens(columns, None)


def test_what_waits_is_merged_in_order_up_to_a_size_that_is_read_in_a_moment() -> None:
    outbox = RouterOutbox(1_000, 1 << 20)
    for step in range(40):
        outbox.put_tokens(tokens(step))
    outbox.put(scheduler_pb2.AttachResponse(go_away=scheduler_pb2.GoAway()))
    outbox.put_tokens(tokens(40))
    sizes, steps = [], []
    while (message := outbox.take(7)) is not None:
        if message.HasField("tokens"):
            ids = np.frombuffer(message.tokens.token_ids, np.int32)
            sizes.append(ids.size // ROWS)
            steps += ids[::ROWS].tolist()
        else:
            sizes.append(0)
    assert sizes == [16, 16, 8, 0, 1]
    assert steps == list(range(41))


async def under_way(window_bytes: int | None) -> int:
    """Token entries that left the outbox for a router that read as fast as it could for a while and then stopped."""
    hub = Hub(HubSettings(), incarnation=1)
    server = grpc.aio.server()
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(SchedulerService(hub, 0.1), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with open_channel(CommonSettings(), address, window_bytes) as channel:
            call = scheduler_pb2_grpc.SchedulerServiceStub(channel).Attach()
            await call.write(ROUTER_HELLO)
            await eventually(lambda: bool(hub.routers))
            (router,) = hub.routers.values()
            for step in range(300):
                router.put_tokens(tokens(step))
                assert await call.read() is not grpc.aio.EOF
            for step in range(1_000):
                router.put_tokens(tokens(step))
            left = -1
            while left != router.outbox._tokens:  # until the writer hangs
                left = router.outbox._tokens
                await asyncio.sleep(0.1)
            return 1_000 * ROWS - left
    finally:
        await server.stop(0)


def test_little_is_under_way_to_a_router_that_stops_reading() -> None:
    async def main() -> None:
        bounded = await under_way(_ATTACH_WINDOW_BYTES)
        assert bounded <= 3 * 4_096
        assert bounded < await under_way(None) / 3

    asyncio.run(main())


def test_the_streams_of_a_window_are_woken_by_and_by() -> None:
    async def main() -> None:
        hub = RouterHub(RouterSession(SessionSettings(incarnation=1)))
        streams = [ClientStream(None, bounded=True) for _ in range(40)]  # type: ignore[arg-type]
        hub._wake(deque(streams))
        woken = []
        for _ in range(4):
            woken.append(sum(stream.ready for stream in streams))
            await asyncio.sleep(0)  # where the loop reads what came
        assert woken == [16, 32, 40, 40]
        assert [stream.ready for stream in streams] == [True] * 40

    asyncio.run(main())
