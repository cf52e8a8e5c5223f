"""Processes die, freeze and leave in the middle of streams; every stream ends as if nothing had happened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from octavo.v1 import common_pb2, inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

from deploy.cluster import LocalCluster

pytestmark = pytest.mark.xdist_group("faults")

STREAMS, OUTPUT = 16, 120
Outcome = tuple[list[int], int]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two workers of one model and one of another; leases are generous, so that only what a test does counts as death."""
    flags = {
        "scheduler": {"lease-ms": 1000},
        "router": {"lease-ms": 1000},
        "worker": {"lease-ms": 1000, "served-name": "m", "mock-step-ms": 10},
    }
    with LocalCluster(redis=False, workers=2, flags=flags) as cluster:
        cluster.add("worker", served_name="other")
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster) -> list[Outcome]:
    return asyncio.run(generate(cluster, lambda: None))


async def generate(cluster: LocalCluster, disturb: Callable[[], None]) -> list[Outcome]:
    """Token ids and finish reason of all streams, while `disturb` runs in their middle."""

    async def one(stub: inference_pb2_grpc.InferenceServiceAsyncStub, number: int) -> Outcome:
        request = inference_pb2.GenerateRequest(
            model="m" if number % 4 else "other",
            token_ids=inference_pb2.TokenIds(ids=[(7 * number + i) % 200 + 2 for i in range(20 + number)]),
            sampling=inference_pb2.SamplingParams(max_tokens=OUTPUT, ignore_eos=True, seed=number, temperature=0.8),
        )
        token_ids: list[int] = []
        async for event in stub.Generate(request, timeout=60):
            token_ids += event.delta.token_ids
        return token_ids, event.finished.finish_reason

    async with grpc.aio.insecure_channel(cluster.routers[0]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        streams = [asyncio.create_task(one(stub, number)) for number in range(STREAMS)]
        await asyncio.sleep(0.4)
        await asyncio.to_thread(disturb)
        return await asyncio.gather(*streams)


def kill_a_worker(cluster: LocalCluster) -> None:
    cluster.members["worker-1"].kill()
    cluster.restart("worker-1")


def freeze_a_worker(cluster: LocalCluster) -> None:
    cluster.members["worker-2"].suspend()
    time.sleep(2.0)
    cluster.members["worker-2"].resume()


def stop_a_worker(cluster: LocalCluster) -> None:
    assert cluster.members["worker-1"].stop() == 0
    cluster.restart("worker-1")


def kill_all_workers(cluster: LocalCluster) -> None:
    names = [name for name in cluster.members if name.startswith("worker")]
    for name in names:
        cluster.members[name].kill()
    for name in names:
        cluster.restart(name)


def kill_the_scheduler(cluster: LocalCluster) -> None:
    cluster.members["scheduler-1"].kill()
    cluster.restart("scheduler-1")


def freeze_the_scheduler(cluster: LocalCluster) -> None:
    cluster.members["scheduler-1"].suspend()
    time.sleep(2.0)
    cluster.members["scheduler-1"].resume()


def freeze_the_router(cluster: LocalCluster) -> None:
    cluster.members["router-1"].suspend()
    time.sleep(2.0)
    cluster.members["router-1"].resume()


@pytest.mark.parametrize(
    "disturb",
    [
        kill_a_worker,
        freeze_a_worker,
        stop_a_worker,
        kill_all_workers,
        kill_the_scheduler,
        freeze_the_scheduler,
        freeze_the_router,
    ],
)
def test_no_token_is_lost_repeated_or_changed(
    cluster: LocalCluster, undisturbed: list[Outcome], disturb: Callable[[LocalCluster], None]
) -> None:
    assert all(len(ids) == OUTPUT and reason == common_pb2.FINISH_REASON_LENGTH for ids, reason in undisturbed)
    assert asyncio.run(generate(cluster, lambda: disturb(cluster))) == undisturbed
    assert_all_is_free(cluster)
    for member in cluster.members.values():
        assert "Traceback" not in member.log_text()


def assert_all_is_free(cluster: LocalCluster) -> None:
    """All three workers are back, and own nothing, soon."""
    with grpc.insecure_channel(cluster.schedulers[0]) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        until = time.monotonic() + 20
        while True:
            workers = stub.ListWorkers(scheduler_pb2.ListWorkersRequest(), timeout=5).workers
            if len(workers) == 3 and not any(worker.running or worker.blocks_used for worker in workers):
                return
            assert time.monotonic() < until, workers
            time.sleep(0.05)


def test_two_models_are_served_at_once(cluster: LocalCluster) -> None:
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        until = time.monotonic() + 10
        models: list[str] = []
        while models != ["m", "other"] and time.monotonic() < until:
            models = [model.name for model in stub.ListModels(inference_pb2.ListModelsRequest()).models if model.ready]
        assert models == ["m", "other"]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(inference_pb2.GenerateRequest(text="x")))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # which of the two?
