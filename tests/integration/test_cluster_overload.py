"""Ten times what a cluster can do: who is refused is told when to come again, who is let in gets every token, and all comes home."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from octavo.v1 import common_pb2, inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

from deploy.cluster import LocalCluster
from service.errors import Reason, from_rpc_error

pytestmark = pytest.mark.xdist_group("overload")

KEYS = {tenant: f"key-of-{tenant}-0123456789" for tenant in ("heavy", "light", "urgent")}
PROMPTS = [[2 + (13 * number + 7 * at) % 250 for at in range(20 + number)] for number in range(5)]
OUTPUT = 60
ROWS = 4


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# tenants\n" + "".join(f"{key} {tenant}\n" for tenant, key in KEYS.items()))
    return path


@pytest.fixture(scope="module")
def cluster(key_file: Path) -> Iterator[LocalCluster]:
    """Four rows, so eight requests a second, and blocks for not quite as many."""
    flags: dict[str, dict[str, Any]] = {
        "scheduler": {"lease-ms": 3000, "max-waiting": 6},
        "router": {"lease-ms": 3000, "api-keys": str(key_file)},
        "worker": {
            "lease-ms": 3000,
            "max-model-len": 256,
            "max-rows": ROWS,
            "num-blocks": 18,
            "max-num-batched-tokens": 32,
            "mock-step-ms": 8,
        },
    }
    with LocalCluster(redis=False, flags=flags) as cluster:
        yield cluster


@dataclass
class Outcome:
    """How one request went."""

    tenant: str
    number: int
    wanted: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: int = 0
    code: str = ""
    reason: Reason | None = None
    retry_after_ms: int = 0


class Callers:
    """All tenants, on one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

    async def ask(
        self, tenant: str, number: int, wanted: int = OUTPUT, priority: int = 0, timeout: float | None = None
    ) -> Outcome:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=PROMPTS[number % len(PROMPTS)]),
            priority=priority,
            sampling=inference_pb2.SamplingParams(max_tokens=wanted, ignore_eos=True, temperature=0.0),
        )
        outcome = Outcome(tenant, number, wanted)
        metadata = (("authorization", f"Bearer {KEYS[tenant]}"),)
        try:
            async for event in self.stub.Generate(request, metadata=metadata, timeout=timeout):
                outcome.token_ids += event.delta.token_ids
                outcome.finish_reason = outcome.finish_reason or event.finished.finish_reason
        except grpc.aio.AioRpcError as error:
            outcome.code = error.code().name
            decoded = from_rpc_error(error)
            if decoded is not None:
                outcome.reason, outcome.retry_after_ms = decoded.reason, decoded.retry_after_ms
        return outcome


def queue_of(cluster: LocalCluster) -> tuple[scheduler_pb2.QueueStatus, scheduler_pb2.WorkerStatus]:
    with grpc.insecure_channel(cluster.schedulers[0]) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        (view,) = stub.Inspect(scheduler_pb2.InspectRequest(once=True))
    return view.queue, view.workers[0].status


def assert_all_came_home(cluster: LocalCluster) -> None:
    """Nothing waits, runs or owns a block, soon."""
    until = time.monotonic() + 10
    while True:
        queue, worker = queue_of(cluster)
        if queue.waiting == queue.waiting_tokens == queue.running == worker.blocks_used == 0:
            return
        assert time.monotonic() < until, (queue, worker)
        time.sleep(0.05)


async def flood(cluster: LocalCluster) -> tuple[list[list[int]], list[Outcome]]:
    """What each prompt gives on the idle cluster, then some 80 requests a second for five seconds."""
    async with grpc.aio.insecure_channel(cluster.routers[0]) as channel:
        callers = Callers(channel)
        reference = [(await callers.ask("light", number)).token_ids for number in range(len(PROMPTS))]
        async with asyncio.TaskGroup() as group:
            tasks = []
            for turn in range(400):
                number = turn * 7
                if turn % 40 == 20:
                    tasks.append(group.create_task(callers.ask("urgent", number, 20, priority=5)))
                elif turn % 11 == 0:
                    tasks.append(group.create_task(callers.ask("light", number)))
                else:
                    timeout = 0.7 if turn % 10 == 3 else None
                    tasks.append(group.create_task(callers.ask("heavy", number, OUTPUT - turn % 30, 0, timeout)))
                await asyncio.sleep(0.0125)
        return reference, [task.result() for task in tasks]


def test_ten_times_the_capacity(cluster: LocalCluster) -> None:
    reference, outcomes = asyncio.run(flood(cluster))
    assert all(len(token_ids) == OUTPUT for token_ids in reference)
    ends: dict[str, Counter[str]] = {tenant: Counter() for tenant in KEYS}
    for one in outcomes:
        ends[one.tenant][one.code or "finished"] += 1
        expected = reference[one.number % len(PROMPTS)][: one.wanted]
        assert one.token_ids == expected[: len(one.token_ids)]
        if one.code == "RESOURCE_EXHAUSTED":
            assert (one.reason, one.token_ids) == (Reason.QUEUE_FULL, [])
            assert one.retry_after_ms > 0
        elif one.code == "DEADLINE_EXCEEDED":
            assert one.tenant == "heavy"
        else:
            assert (one.code, one.finish_reason) == ("", common_pb2.FINISH_REASON_LENGTH)
            assert one.token_ids == expected
    # It was overload, nobody had all of it, and who asked for less was refused less.
    assert ends["heavy"]["RESOURCE_EXHAUSTED"] > 50, ends
    assert ends["light"]["finished"] > 0, ends
    assert ends["heavy"]["finished"] > 0, ends
    share = {tenant: counts["finished"] / counts.total() for tenant, counts in ends.items()}
    assert share["light"] > share["heavy"], ends
    # The urgent ones came when every row was taken, and took one.
    assert ends["urgent"]["finished"] > 5, ends
    assert_all_came_home(cluster)
    assert queue_of(cluster)[0].counters["priority_preemptions"] > 0


def test_a_deadline_in_a_row_and_one_in_the_queue_free_their_places(cluster: LocalCluster) -> None:
    async def main() -> list[Outcome]:
        async with grpc.aio.insecure_channel(cluster.routers[0]) as channel:
            callers = Callers(channel)
            return await asyncio.gather(
                *(callers.ask("heavy", number, 200, timeout=0.6) for number in range(ROWS)),
                *(callers.ask("light", number, 200, timeout=0.5) for number in range(3)),
            )

    for one in asyncio.run(main()):
        assert one.code == "DEADLINE_EXCEEDED"
        assert len(one.token_ids) < 200
    assert_all_came_home(cluster)


def test_the_command_takes_the_key_from_its_environment(cluster: LocalCluster) -> None:
    def generate(**env: str) -> subprocess.CompletedProcess[str]:
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [
            sys.executable,
            "-m",
            "octavo.cli.main",
            "generate",
            "hi",
            "-n",
            "3",
            "--address",
            cluster.routers[0],
        ]
        return subprocess.run(
            command, env={**os.environ, **paths, **env}, capture_output=True, text=True, timeout=60, check=False
        )

    assert generate(OCTAVO_API_KEY=KEYS["light"]).returncode == 0
    refused = generate(OCTAVO_API_KEY="a-key-that-nobody-knows")
    assert refused.returncode != 0
    assert "API key" in refused.stderr


def test_tickets_belong_to_the_tenant_of_the_key(cluster: LocalCluster) -> None:
    async def main() -> tuple[str, Reason | None]:
        async with grpc.aio.insecure_channel(cluster.routers[0]) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=PROMPTS[0]), sampling=inference_pb2.SamplingParams(max_tokens=100)
            )
            call = stub.Generate(request, metadata=(("authorization", f"Bearer {KEYS['light']}"),))
            started = (await call.read()).started
            call.cancel()
            request.resume.ticket, request.resume.seed = started.ticket, started.seed
            try:
                await stub.Generate(request, metadata=(("authorization", f"Bearer {KEYS['heavy']}"),)).read()
            except grpc.aio.AioRpcError as error:
                decoded = from_rpc_error(error)
                return error.code().name, decoded and decoded.reason
        return "OK", None

    assert asyncio.run(main()) == ("INVALID_ARGUMENT", Reason.TICKET_INVALID)


def test_keys_are_read_again_on_sighup_and_a_bad_file_changes_nothing(cluster: LocalCluster, key_file: Path) -> None:
    def code(key: str) -> str:
        with grpc.insecure_channel(cluster.routers[0]) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            try:
                stub.ListModels(
                    inference_pb2.ListModelsRequest(), metadata=(("authorization", f"Bearer {key}"),), timeout=10
                )
            except grpc.RpcError as error:
                return str(error.code().name)  # type: ignore[attr-defined]
        return "OK"

    def eventually(key: str, wanted: str) -> None:
        until = time.monotonic() + 10
        while code(key) != wanted:
            assert time.monotonic() < until
            time.sleep(0.05)

    new_key = "key-that-came-later-01"
    before = key_file.read_text()
    assert code(new_key) == "UNAUTHENTICATED"
    try:
        key_file.write_text("too short\n")
        cluster.members["router-1"].signal(signal.SIGHUP)
        until = time.monotonic() + 10
        while "the API keys stay as they were" not in cluster.members["router-1"].log_text():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert code(KEYS["light"]) == "OK"
        key_file.write_text(f"{new_key} later\n" + before.replace(KEYS["heavy"], "key-of-heavy-is-another"))
        cluster.members["router-1"].signal(signal.SIGHUP)
        eventually(new_key, "OK")
        assert code(KEYS["light"]) == "OK"
        assert code(KEYS["heavy"]) == "UNAUTHENTICATED"
    finally:
        key_file.write_text(before)
        cluster.members["router-1"].signal(signal.SIGHUP)
    eventually(KEYS["heavy"], "OK")
