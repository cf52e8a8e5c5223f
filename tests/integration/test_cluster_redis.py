"""Redis dies and comes back: no stream notices, a metric says so, and whoever came meanwhile is found afterwards."""

from __future__ import annotations

import asyncio
import urllib.request

import pytest
from octavo.client import AsyncClient, Client

from deploy.cluster import LocalCluster

pytestmark = pytest.mark.xdist_group("redis")


def redis_up(cluster: LocalCluster) -> dict[str, float]:
    """What each process says of Redis."""
    said = {}
    for name, member in cluster.members.items():
        if name != "redis":
            with urllib.request.urlopen(f"http://{member.ready.metrics}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            (value,) = (line.split()[1] for line in lines if line.startswith("octavo_redis_up "))
            said[name] = float(value)
    return said


async def until_all_say(cluster: LocalCluster, value: float) -> None:
    async with asyncio.timeout(30):
        while True:
            if set((await asyncio.to_thread(redis_up, cluster)).values()) == {value}:
                return
            await asyncio.sleep(0.1)


def test_no_stream_notices_that_redis_dies() -> None:
    lease = {"lease-ms": 1000}
    flags = {"scheduler": lease, "router": lease, "worker": lease | {"mock-step-ms": 10}}
    with LocalCluster(flags=flags, workers=1, routers=1) as cluster:

        async def one(client: AsyncClient, number: int) -> list[int]:
            stream = client.generate(
                [300 + number] * 9, max_tokens=100, ignore_eos=True, temperature=0, idempotency_key=f"k{number}"
            )
            return list((await stream.result()).outputs[0].token_ids)

        async def main() -> None:
            async with AsyncClient(cluster.routers) as client:
                expected = await asyncio.gather(*(one(client, number) for number in range(8)))
                await until_all_say(cluster, 1.0)
                running = [asyncio.create_task(one(client, 100 + number)) for number in range(8)]
                await asyncio.sleep(0.2)
                await asyncio.to_thread(cluster.members["redis"].kill)
                begun_without = [asyncio.create_task(one(client, 200 + number)) for number in range(8)]
                assert all(len(tokens) == 100 for tokens in await asyncio.gather(*running, *begun_without))
                await until_all_say(cluster, 0.0)
                await asyncio.to_thread(cluster.restart, "redis")
                await until_all_say(cluster, 1.0)
                worker = await asyncio.to_thread(
                    cluster.add, "worker"
                )  # finds the scheduler in a Redis that began empty
                assert "enlisted with" in worker.log_text()
                await asyncio.to_thread(cluster.members["worker-1"].stop)
                again = [
                    list(
                        (await client.generate([300 + n] * 9, max_tokens=100, ignore_eos=True, temperature=0).result())
                        .outputs[0]
                        .token_ids
                    )
                    for n in range(2)
                ]
                assert again == expected[:2]

        asyncio.run(main())
        with Client(cluster.routers) as client:
            assert [model.workers for model in client.list_models()] == [1]
