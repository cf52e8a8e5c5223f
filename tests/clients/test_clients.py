"""Each client's own program against a cluster of ours: what it asserts, and that what it abandons is free soon."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from octavo.v1 import scheduler_pb2, scheduler_pb2_grpc

from deploy.cluster import LocalCluster
from tests.clients.environments import environment

pytestmark = [pytest.mark.clients, pytest.mark.xdist_group("clients")]

HERE = Path(__file__).parent
CHECKS = ("chat", "stream", "n", "logprobs", "stop", "seed", "tools", "timeout", "cancel_by_closing", "retry_on_429")
PROGRAMS = {
    "openai": ("bin/python", "drive_openai.py"),
    "langchain": ("bin/python", "drive_langchain.py"),
    "litellm": ("bin/python", "drive_litellm.py"),
    "node": ("bin/node", "drive_openai.mjs"),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Four rows and room for four that wait, so that two dozen requests at once have to come again."""
    flags: dict[str, dict[str, Any]] = {
        "scheduler": {"lease-ms": 5000, "max-waiting": 4},
        "router": {"lease-ms": 5000},
        "worker": {"lease-ms": 5000, "max-model-len": 8192, "max-rows": 4, "mock-step-ms": 5},
    }
    with LocalCluster(redis=False, flags=flags) as cluster:
        yield cluster


@pytest.mark.parametrize("name", PROGRAMS)
def test_client(cluster: LocalCluster, name: str) -> None:
    folder = environment(name)
    program, script = PROGRAMS[name]
    path = HERE / script
    if name == "node":  # it looks for packages beside the program
        path = folder / script
        path.write_bytes((HERE / script).read_bytes())
    refused = refusals(cluster)
    done = subprocess.run(
        [folder / program, path, f"http://{cluster.gateways[0]}/v1"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
    )
    assert done.returncode == 0, f"after {done.stdout.split()}:\n{done.stderr[-6000:]}"
    assert set(CHECKS) <= set(done.stdout.split())
    assert refusals(cluster) > refused, "nobody was told to come again"
    assert_all_free(cluster)
    assert "Traceback" not in cluster.members["router-1"].log_text()


def refusals(cluster: LocalCluster) -> float:
    """Requests that were refused for a full queue so far."""
    with urllib.request.urlopen(f"http://{cluster.gateways[0]}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if 'outcome="QUEUE_FULL"' in line and "_total" in line)


def assert_all_free(cluster: LocalCluster) -> None:
    """No request runs and no block is owned, soon: also those of clients that hung up."""
    with grpc.insecure_channel(cluster.schedulers[0]) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        until = time.monotonic() + 5
        while True:
            (worker,) = stub.ListWorkers(scheduler_pb2.ListWorkersRequest()).workers
            if worker.running == 0 and worker.blocks_used == 0:
                return
            assert time.monotonic() < until, worker
            time.sleep(0.05)
