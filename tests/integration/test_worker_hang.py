"""A device hangs in the middle of streams: they go on elsewhere, its worker is not asked again, ends, and can be started anew."""

from __future__ import annotations

import asyncio
import time

import grpc
from octavo.v1 import inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

from deploy.cluster import LocalCluster

STREAMS, OUTPUT = 16, 100
FLAGS = {"scheduler": {"lease-ms": 1000}, "router": {"lease-ms": 1000}, "worker": {"lease-ms": 1000, "mock-step-ms": 8}}


async def _generate(router: str) -> list[list[int]]:
    async def one(stub: inference_pb2_grpc.InferenceServiceAsyncStub, number: int) -> list[int]:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=[(7 * number + i) % 200 + 2 for i in range(20 + number)]),
            sampling=inference_pb2.SamplingParams(max_tokens=OUTPUT, ignore_eos=True, seed=number, temperature=0.8),
        )
        return [token async for event in stub.Generate(request, timeout=60) for token in event.delta.token_ids]

    async with grpc.aio.insecure_channel(router) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return await asyncio.gather(*(one(stub, number) for number in range(STREAMS)))


def _workers(cluster: LocalCluster) -> list[str]:
    with grpc.insecure_channel(cluster.schedulers[0]) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        return sorted(w.name for w in stub.ListWorkers(scheduler_pb2.ListWorkersRequest(), timeout=5).workers)


def test_a_hung_device_costs_a_pause_and_its_worker_a_restart() -> None:
    with LocalCluster(redis=False, workers=1, flags=FLAGS) as cluster:
        undisturbed = asyncio.run(_generate(cluster.routers[0]))
        assert all(len(tokens) == OUTPUT for tokens in undisturbed)
        cluster.members["worker-1"].stop()
        cluster.restart("worker-1")  # its cache must not attract the requests of the second run
        hangs = cluster.add("worker", mock_hang_at_step=40, hang_seconds=1.0, hang_exit_seconds=3.0)
        assert asyncio.run(_generate(cluster.routers[0])) == undisturbed
        assert _workers(cluster) == ["worker-1"]  # it hangs still, and is not asked again
        assert hangs.wait(30) == 1
        text = hangs.log_text()
        assert text.count("enlisted with") == 1
        assert "no step came back for" in text
        assert text.count("octavo: the device has not ended a step for") == 1
        assert "thread collect:" in text
        assert "leaving: the device has hung for" in text
        cluster.restart(hangs.name)
        until = time.monotonic() + 20
        while _workers(cluster) != ["worker-1", "worker-2"]:
            assert time.monotonic() < until


def test_a_worker_whose_device_hangs_leaves_on_sigterm() -> None:
    flags = {
        **FLAGS,
        "worker": {"mock-hang-at-step": 10, "hang-seconds": 1.0, "hang-exit-seconds": 0, "drain-timeout": 1},
    }
    with LocalCluster(redis=False, workers=1, routers=1, flags=flags) as cluster:
        worker = cluster.members["worker-1"]
        with grpc.insecure_channel(cluster.routers[0]) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.GenerateRequest(
                text="a", sampling=inference_pb2.SamplingParams(max_tokens=50, ignore_eos=True)
            )
            call = stub.Generate(request, timeout=60)
            assert next(call).HasField("started")
            until = time.monotonic() + 30
            while "the device has not ended a step" not in worker.log_text():
                assert time.monotonic() < until
                time.sleep(0.05)
            worker.terminate()
            assert worker.wait(20) == 1
            assert "leaving: the device does not end its steps" in worker.log_text()
            call.cancel()
