"""A key runs once over all routers; a higher attempt takes it over; a dead router and a dead Redis hold nothing up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from octavo.v1 import inference_pb2, inference_pb2_grpc

from deploy.cluster import LocalCluster
from deploy.member import Member
from router.idempotency import REMEMBER_SECONDS, IdempotencyKeys
from router.shared_keys import Held, SharedKeys
from service.discovery import Peer, Registry
from service.errors import OctavoError, Reason, from_rpc_error
from tests.unit.waiting import eventually


class Router:
    """What one router process has of keys and leases."""

    def __init__(self, url: str, number: int) -> None:
        self.me = Peer(f"127.0.0.1:{number}", str(number), f"router-{number}")
        self.alone = 0
        self.ended: list[OctavoError] = []
        self._url = url
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Router:
        self.shared = SharedKeys(self._url, self.me, self._on_alone)
        self.keys = IdempotencyKeys(asyncio.get_running_loop().time, self.shared)
        self.registry = Registry(self._url)
        self.tasks = [
            asyncio.create_task(self.registry.hold("router", self.me, asyncio.Event())),
            asyncio.create_task(self.shared.listen(self.keys.taken_over)),
        ]
        redis: Any = self.shared._redis
        async with asyncio.timeout(10):
            while True:
                leased = await redis.exists(f"octavo:router:{self.me.address}")
                ((_, listening),) = await redis.pubsub_numsub(f"octavo:takeover:{self.me.incarnation}")
                if leased and listening:
                    return self
                await asyncio.sleep(0.01)

    async def __aexit__(self, *exc: object) -> None:
        for task in self.tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self.keys.close()
        await self.shared.close()
        await self.registry.close()

    def _on_alone(self) -> None:
        self.alone += 1

    async def claim(self, key: str, attempt: int = 0, tenant: str = "t") -> Any:
        return await self.keys.claim(tenant, key, attempt, self.ended.append)

    async def refused(self, key: str, attempt: int = 0) -> bool:
        try:
            claim = await self.claim(key, attempt)
        except OctavoError as error:
            assert error.reason is Reason.DUPLICATE_REQUEST
            return True
        self.keys.release(claim, ran=False)
        await self.keys.close()
        return False


@asynccontextmanager
async def two_routers(url: str) -> AsyncIterator[tuple[Router, Router]]:
    async with Router(url, 1) as first, Router(url, 2) as second:
        yield first, second


def play(url: str, scenario: Callable[[Router, Router], Any]) -> None:
    async def main() -> None:
        async with two_routers(url) as (first, second):
            await scenario(first, second)

    asyncio.run(main())


def test_one_of_two_routers_runs_it(redis_server: Member) -> None:
    async def scenario(first: Router, second: Router) -> None:
        claim = await first.claim("k")
        assert await second.refused("k")
        assert await first.refused("k")
        assert not await second.refused("another")
        assert (await second.claim("k", tenant="another")).shared
        first.keys.release(claim, ran=True)
        await first.keys.close()
        assert await second.refused("k")  # it has run
        assert await first.refused("k")
        assert not await second.refused("k", attempt=1)  # but a retry may want the answer that was lost

    play(redis_server.address, scenario)


def test_what_was_refused_or_failed_leaves_no_trace(redis_server: Member) -> None:
    async def scenario(first: Router, second: Router) -> None:
        first.keys.release(await first.claim("k"), ran=False)
        await first.keys.close()
        assert not await second.refused("k")
        assert not await first.refused("k")

    play(redis_server.address, scenario)


def test_a_higher_attempt_takes_over_and_the_holder_hears_of_it(redis_server: Member) -> None:
    async def scenario(first: Router, second: Router) -> None:
        claim = await first.claim("k")
        taken = await second.claim("k", attempt=1)
        await eventually(lambda: bool(first.ended))
        assert first.ended[0].reason is Reason.DUPLICATE_REQUEST
        first.keys.release(claim, ran=False)  # must not take it from its new owner
        await first.keys.close()
        assert await first.refused("k", attempt=1)
        second.keys.release(taken, ran=False)

    play(redis_server.address, scenario)


def test_a_claim_that_was_cancelled_while_redis_answered_leaves_no_trace(redis_server: Member) -> None:
    async def scenario(first: Router, second: Router) -> None:
        taken, take = asyncio.Event(), first.shared.take

        async def slow(tenant: str, key: str, attempt: int) -> Held | None:
            held = await take(tenant, key, attempt)
            taken.set()
            await asyncio.Event().wait()
            return held

        first.shared.take = slow  # type: ignore[method-assign]
        claiming = asyncio.create_task(first.claim("k"))
        await taken.wait()
        assert await second.refused("k")
        claiming.cancel()
        with suppress(asyncio.CancelledError):
            await claiming
        await first.keys.close()
        assert not await second.refused("k")

    play(redis_server.address, scenario)


def test_an_older_attempt_that_comes_late_takes_nothing(redis_server: Member) -> None:
    async def scenario(first: Router, second: Router) -> None:
        assert await first.shared.take("t", "k", 1) is None
        assert await first.shared.take("t", "k", 0) == Held(1, True)
        assert await second.refused("k", attempt=1)

    play(redis_server.address, scenario)


def test_a_key_that_is_just_being_released_is_not_lost_by_who_takes_it(redis_server: Member) -> None:
    async def scenario(first: Router, second: Router) -> None:
        first.keys.release(await first.claim("k"), ran=False)
        await first.claim("k")
        await first.keys.close()
        assert await second.refused("k")

    play(redis_server.address, scenario)


def test_a_dead_router_holds_no_key(redis_server: Member) -> None:
    async def scenario(first: Router, second: Router) -> None:
        await first.claim("k")
        for task in first.tasks:
            task.cancel()
        redis: Any = second.shared._redis
        await redis.delete(f"octavo:router:{first.me.address}")  # its lease runs out
        assert not await second.refused("k")

    play(redis_server.address, scenario)


def test_without_redis_each_router_answers_for_itself(redis_server: Member) -> None:
    async def scenario(first: Router, second: Router) -> None:
        redis_server.kill()
        claim = await first.claim("k")
        assert await first.refused("k")
        assert not await second.refused("k")
        assert first.alone == 1 and second.alone == 1
        redis_server.start()
        first.keys.release(claim, ran=True)
        redis: Any = first.shared._redis
        async with asyncio.timeout(20):
            while True:
                with suppress(Exception):
                    if await redis.ping():
                        break
                await asyncio.sleep(0.05)
        assert await first.shared.take("t", "new", 0) is None
        assert await second.shared.take("t", "new", 0) in (None, Held(0, True))  # None until the lease is back
        assert await first.refused("k")

    play(redis_server.address, scenario)


def test_ends_are_forgotten_in_time() -> None:
    async def main() -> None:
        now = 0.0
        keys = IdempotencyKeys(lambda: now)
        keys.release(await keys.claim("t", "k", 0, lambda error: None), ran=True)
        now = REMEMBER_SECONDS - 1
        with pytest.raises(OctavoError):
            await keys.claim("t", "k", 0, lambda error: None)
        now = REMEMBER_SECONDS + 1
        await keys.claim("t", "k", 0, lambda error: None)
        assert not keys._ended

    asyncio.run(main())


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    lease = {"lease-ms": 2000}
    flags = {"worker": lease | {"mock-step-ms": 10}, "scheduler": lease, "router": lease}
    with LocalCluster(workers=1, routers=2, flags=flags) as cluster:
        yield cluster


def test_routers_of_a_cluster_share_keys(cluster: LocalCluster) -> None:
    request = inference_pb2.GenerateRequest(
        text="hello",
        sampling=inference_pb2.SamplingParams(max_tokens=1_000, ignore_eos=True),
        idempotency_key="shared",
    )

    async def main() -> None:
        async with AsyncExitStack() as stack:
            stubs = []
            for address in cluster.routers:
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
                stubs.append(inference_pb2_grpc.InferenceServiceStub(channel))
            first = stubs[0].Generate(request)
            assert (await first.read()).HasField("started")
            assert await reason_of(stubs[1].Generate(request)) is Reason.DUPLICATE_REQUEST
            request.attempt = 1
            second = stubs[1].Generate(request)
            assert (await second.read()).HasField("started")
            assert await reason_of(first) is Reason.DUPLICATE_REQUEST  # it gave up
            second.cancel()

    asyncio.run(main())


def test_a_router_that_drains_holds_its_keys_to_the_end(cluster: LocalCluster) -> None:
    request = inference_pb2.GenerateRequest(
        text="hello", sampling=inference_pb2.SamplingParams(max_tokens=250, ignore_eos=True), idempotency_key="drained"
    )

    async def main() -> None:
        async with AsyncExitStack() as stack:
            stubs = []
            for address in cluster.routers:
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
                stubs.append(inference_pb2_grpc.InferenceServiceStub(channel))
            running = stubs[0].Generate(request)
            assert (await running.read()).HasField("started")
            stopping = asyncio.create_task(asyncio.to_thread(cluster.members["router-1"].stop))
            await asyncio.sleep(0.5)
            assert await reason_of(stubs[1].Generate(request)) is Reason.DUPLICATE_REQUEST
            while (event := await running.read()) is not grpc.aio.EOF:
                last = event
            assert last.HasField("finished") and await stopping == 0

    asyncio.run(main())


async def reason_of(call: Any) -> Reason | None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    error = from_rpc_error(caught.value)
    return error.reason if error else None
