"""What a cluster does through gRPC, on this machine, in one run: `python -m bench.serving MODEL_DIR [--json FILE] [--only NAME …]`.

    against     one stream and 16 streams of 64 + 64 tokens, beside transformers on the same cores (alternating, best of the repeats)
    prefix      TTFT of a first and a second request that share a prompt of 1,000 tokens
    waste       share of KV slots that are allocated but unused while 16 requests of 300 to 1,000 tokens run
    abandoned   time until no block is owned after the last of 200 hang-ups
    mock        tokens/s through one and through two routers at 256 streams on mock, and the processor time of a token in each process

Each starts a cluster of its own on free ports. Timings are for comparison within the run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from octavo.v1 import inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

from bench.running import cluster, cpu_seconds, head, load


def against(model: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Our tokens/s through gRPC over those of transformers, prefill included in both."""
    peer = subprocess.Popen(
        [sys.executable, "-m", "bench.transformers_cpu", model, "--dtype", dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert peer.stdin is not None
    assert peer.stdout is not None
    result: dict[str, Any] = {}
    with peer, cluster(model, "torch", {"dtype": dtype, "max-model-len": 2048}) as running:
        for streams in (1, 16):
            ours, theirs = [], []
            for repeat in range(repeats + 1):
                shape = {"requests": streams, "concurrency": streams, "input_len": 64, "output_len": 64, "seed": repeat}
                ours.append(load(running, **shape)["output_tokens_per_s"])
                peer.stdin.write(f"{streams}\n")
                peer.stdin.flush()
                theirs.append(float(peer.stdout.readline()))
            best, best_peer = max(ours[1:]), max(theirs[1:])
            result[f"{streams}_streams"] = {
                "octavo_tokens_per_s": best,
                "transformers_tokens_per_s": best_peer,
                "ratio": best / best_peer,
                "all": {"octavo": ours, "transformers": theirs},
            }
        peer.stdin.close()
    return result


def prefix(model: str, dtype: str, repeats: int) -> dict[str, Any]:
    """TTFT of the second of two requests with a common prompt of 1,000 tokens over that of the first."""
    pairs = []
    with cluster(model, "torch", {"dtype": dtype, "max-model-len": 2048}) as running:
        load(running, requests=1, concurrency=1, input_len=16, output_len=2, seed=99)
        for repeat in range(repeats):
            shape = {"requests": 1, "concurrency": 1, "input_len": 1_016, "prefix_len": 1_000, "output_len": 4}
            first = load(running, **shape, seed=repeat)["ttft_ms"]["p50"]
            second = load(running, **shape, seed=repeat, first_request=1)["ttft_ms"]["p50"]
            pairs.append({"first_ms": first, "second_ms": second, "ratio": second / first})
    return {"pairs": pairs, "ratio": statistics.median(pair["ratio"] for pair in pairs)}


def waste(_model: str, _dtype: str, _repeats: int) -> dict[str, Any]:
    """Allocated but unused slots of 16 running requests of 300 to 1,000 tokens, sampled while they run."""
    shares: list[float] = []
    sizes = random.Random(0)
    with (
        cluster("mock", "mock", {"mock-step-ms": 4, "max-rows": 16}) as running,
        grpc.insecure_channel(running.routers[0]) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = []
        for number in range(16):
            total = sizes.randint(300, 1_000)
            ids = [sizes.randrange(256) for _ in range(total - 200)]
            request = inference_pb2.GenerateRequest(
                model="m",
                token_ids=inference_pb2.TokenIds(ids=ids),
                sampling=inference_pb2.SamplingParams(max_tokens=200, ignore_eos=True, seed=number),
            )
            calls.append(stub.Generate(request))
        with grpc.insecure_channel(running.schedulers[0]) as admin:
            inspector = scheduler_pb2_grpc.SchedulerServiceStub(admin)
            while True:
                (view,) = inspector.Inspect(scheduler_pb2.InspectRequest(once=True, rows=True))
                rows = view.workers[0].rows
                if shares and not rows:
                    break
                if len(rows) == 16:
                    slots = sum(len(row.block_ids) // 4 * 16 for row in rows)
                    shares.append(1 - sum(row.num_computed for row in rows) / slots)
        for call in calls:
            call.cancel()
    return {"samples": len(shares), "mean": statistics.mean(shares), "max": max(shares)}


def abandoned(_model: str, _dtype: str, _repeats: int) -> dict[str, Any]:
    """Seconds from the last of 200 hang-ups until nobody owns a block."""
    with cluster("mock", "mock", {"mock-step-ms": 2}) as running:
        shape = {"requests": 200, "concurrency": 100, "input_len": 64, "output_len": 2_000, "abandon_after": 5}
        load(running, 2, **shape)
        ended = time.monotonic()
        with grpc.insecure_channel(running.schedulers[0]) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            while True:
                (worker,) = stub.ListWorkers(scheduler_pb2.ListWorkersRequest()).workers
                if worker.blocks_used == 0 and worker.running == 0:
                    return {"hang_ups": 200, "seconds_until_all_blocks_are_free": time.monotonic() - ended}
                if time.monotonic() - ended > 30:
                    raise RuntimeError(f"{worker.blocks_used} blocks are still owned")


def mock(_model: str, _dtype: str, repeats: int) -> dict[str, Any]:
    """Tokens/s through one and two router processes at 256 streams, and what a token costs each process.

    Where all share a few cores, the processor time of a token says more than the rate: a router alone on a core carries
    `tokens_per_router_core_s`.
    """
    return {f"{routers}_routers": _through_routers(routers, repeats) for routers in (1, 2)}


def _through_routers(routers: int, repeats: int) -> dict[str, Any]:
    runs = []
    with cluster("mock", "mock", routers=routers) as running:
        for repeat in range(repeats + 1):
            shape = {"requests": 512, "concurrency": 256, "input_len": 32, "output_len": 512, "seed": repeat}
            with cpu_seconds(running) as used:
                figures = load(running, 2, **shape)
            tokens = figures["output_tokens"]
            cost = {name: 1e6 * seconds / tokens for name, seconds in used.items()}
            run = {key: figures[key] for key in ("output_tokens_per_s", "token_messages", "ttft_ms", "itl_ms")}
            runs.append({**run, "cpu_us_per_token": cost})
    best = max(runs[1:], key=lambda run: float(run["output_tokens_per_s"]))
    cheapest = min(
        sum(cost for name, cost in run["cpu_us_per_token"].items() if name.startswith("router")) for run in runs[1:]
    )
    return {
        "output_tokens_per_s": best["output_tokens_per_s"],
        "cpu_us_per_token": best["cpu_us_per_token"],
        "tokens_per_router_core_s": 1e6 / cheapest,
        "runs": runs,
    }


MEASUREMENTS: dict[str, Callable[[str, str, int], dict[str, Any]]] = {
    "against": against,
    "prefix": prefix,
    "waste": waste,
    "abandoned": abandoned,
    "mock": mock,
}


def main(arguments: list[str]) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=tuple(MEASUREMENTS), default=tuple(MEASUREMENTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    shown = ["MODEL_DIR" if argument == options.model_dir != "mock" else argument for argument in arguments]
    report: dict[str, Any] = {**head("bench.serving", shown), "dtype": options.dtype}
    for name in options.only:
        report[name] = MEASUREMENTS[name](options.model_dir, options.dtype, options.repeats)
        print(f"{name}: {json.dumps(report[name])}", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
