"""Upgrades and restarts of every process under load: no stream of ours ends in an error, and workers spread again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from octavo.client import AsyncClient
from octavo.client.admin import AdminClient
from octavo.client.connection import Connection
from octavo.v1 import inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

from deploy.cluster import LocalCluster

pytestmark = pytest.mark.xdist_group("rolling")

PROMPTS, TOKENS = 12, 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    lease = {"lease-ms": 1000}
    flags = {
        "scheduler": lease | {"spread-seconds": 0.3},
        "router": lease,
        "worker": lease | {"mock-step-ms": 10},
    }
    with LocalCluster(schedulers=2, workers=3, routers=2, flags=flags) as cluster:
        yield cluster


def request(number: int) -> inference_pb2.GenerateRequest:
    ids = [300 + (number * 31 + i * 7) % 5_000 for i in range(10 + number)]
    sampling = inference_pb2.SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=number, temperature=number % 2)
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids), sampling=sampling)


async def undisturbed(cluster: LocalCluster) -> list[list[int]]:
    async with AsyncClient(cluster.routers) as client:
        results = await asyncio.gather(*(client.stream(request(n)).result() for n in range(PROMPTS)))
    return [list(result.outputs[0].token_ids) for result in results]


class Load:
    """Clients that ask one request after the other until they are told to stop: `resuming` ones are ours, the others plain stubs."""

    def __init__(self, cluster: LocalCluster, expected: list[list[int]]) -> None:
        self._cluster = cluster
        self._expected = expected
        self.over = False
        self.streams = self.plain_streams = 0

    async def resuming(self, number: int) -> None:
        routers = self._cluster.routers
        first = number % len(routers)
        async with AsyncClient(routers[first:] + routers[:first]) as client:
            while not self.over:
                prompt = number % PROMPTS
                result = await client.stream(request(prompt), timeout=60).result()
                assert list(result.outputs[0].token_ids) == self._expected[prompt]
                self.streams += 1

    async def plain(self, number: int, router: str) -> None:
        """A stub at one router, which is not restarted meanwhile: its streams end in time, so none of them may fail."""
        async with grpc.aio.insecure_channel(router) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            while not self.over:
                prompt, ids = number % PROMPTS, []
                async for event in stub.Generate(request(prompt), timeout=60):
                    ids += event.delta.token_ids
                assert ids == self._expected[prompt]
                self.plain_streams += 1


def test_a_rolling_restart_of_everything_adds_no_error(cluster: LocalCluster) -> None:
    async def main() -> None:
        load = Load(cluster, await undisturbed(cluster))
        async with asyncio.TaskGroup() as tasks:
            for number in range(PROMPTS):
                tasks.create_task(load.resuming(number))
            await asyncio.sleep(0.3)
            for name in [name for name in cluster.members if name.startswith("router")]:
                assert await asyncio.to_thread(cluster.members[name].stop) == 0
                await asyncio.to_thread(cluster.restart, name)
            for number in range(4):  # plain clients while workers and schedulers go, whose routers stay
                tasks.create_task(load.plain(number, cluster.routers[number % 2]))
            for name in [name for name in cluster.members if not name.startswith(("router", "redis"))]:
                assert await asyncio.to_thread(cluster.members[name].stop) == 0
                await asyncio.to_thread(cluster.restart, name)
            load.over = True
        assert load.streams >= PROMPTS and load.plain_streams >= 4

    asyncio.run(main())


def test_plain_streams_end_in_time_before_their_router_does(cluster: LocalCluster) -> None:
    async def main() -> None:
        expected = await undisturbed(cluster)
        async with grpc.aio.insecure_channel(cluster.members["router-1"].address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            calls = [stub.Generate(request(n), timeout=60) for n in range(PROMPTS)]
            for call in calls:
                assert (await call.read()).HasField("started")
            stopping = asyncio.create_task(asyncio.to_thread(cluster.members["router-1"].stop))
            for number, call in enumerate(calls):
                ids: list[int] = []
                while (event := await call.read()) is not grpc.aio.EOF:
                    ids += event.delta.token_ids
                assert ids == expected[number]
            assert await stopping == 0
        await asyncio.to_thread(cluster.restart, "router-1")

    asyncio.run(main())


def test_after_a_scheduler_came_back_workers_spread_again(cluster: LocalCluster) -> None:
    async def main() -> None:
        load = Load(cluster, await undisturbed(cluster))
        async with asyncio.TaskGroup() as tasks:
            for number in range(PROMPTS):
                tasks.create_task(load.resuming(number))
            await asyncio.to_thread(cluster.members["scheduler-1"].kill)
            await eventually_workers(cluster, ["scheduler-2"], [3])
            await asyncio.to_thread(cluster.restart, "scheduler-1")
            await eventually_workers(cluster, ["scheduler-1", "scheduler-2"], [1, 2])
            load.over = True

    asyncio.run(main())


def test_a_worker_that_an_operator_drains_ends_and_takes_its_streams_to_their_end(cluster: LocalCluster) -> None:
    async def main() -> None:
        load = Load(cluster, await undisturbed(cluster))
        async with asyncio.TaskGroup() as tasks:
            for number in range(PROMPTS):
                tasks.create_task(load.resuming(number))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(drain, cluster, "worker-2")
            assert await asyncio.to_thread(cluster.members["worker-2"].wait, 20) == 0
            load.over = True
        assert load.streams >= PROMPTS
        await asyncio.to_thread(cluster.restart, "worker-2")

    asyncio.run(main())


def drain(cluster: LocalCluster, name: str) -> None:
    """At whichever scheduler it is."""
    for address in cluster.schedulers:
        with AdminClient(Connection((address,))) as admin:
            for status in admin.list_workers():
                if status.name == name:
                    admin.drain_worker(status.incarnation)
                    return
    raise AssertionError(f"{name} is enlisted nowhere")


async def eventually_workers(cluster: LocalCluster, names: list[str], counts: list[int]) -> None:
    """Wait until these schedulers have so many workers, in either order."""
    async with asyncio.timeout(30):
        while True:
            found = []
            for name in names:
                async with grpc.aio.insecure_channel(cluster.members[name].address) as channel:
                    stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
                    found.append(len((await stub.ListWorkers(scheduler_pb2.ListWorkersRequest(), timeout=5)).workers))
            if sorted(found) == counts:
                return
            await asyncio.sleep(0.1)


def test_with_one_of_each_an_upgrade_is_a_pause_for_newcomers_too() -> None:
    """Plain stubs that ask all the time, while the only worker and then the only scheduler are restarted."""
    lease = {"lease-ms": 1000}
    flags = {"scheduler": lease, "router": lease, "worker": lease | {"mock-step-ms": 5}}
    with LocalCluster(redis=False, flags=flags) as cluster:

        async def main() -> None:
            load = Load(cluster, await undisturbed(cluster))
            async with asyncio.TaskGroup() as tasks:
                for number in range(4):
                    tasks.create_task(load.plain(number, cluster.routers[0]))
                for name in ("worker-1", "scheduler-1", "worker-1"):
                    begun = load.plain_streams
                    assert await asyncio.to_thread(cluster.members[name].stop) == 0
                    await asyncio.to_thread(cluster.restart, name)
                    async with asyncio.timeout(30):
                        while load.plain_streams < begun + 8:  # noqa: ASYNC110 - what is waited for counts up
                            await asyncio.sleep(0.02)
                load.over = True

        asyncio.run(main())
