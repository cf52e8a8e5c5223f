"""What the HTTP door costs beside gRPC, on this machine, in one run: `python -m bench.http [--json FILE] [--repeats N]`.

    streams   tokens/s of one router process at 256 streams, over HTTP (server-sent events) and over gRPC
    ttft      time to the first token at light load, over both, alternating; and the difference of the medians

One scheduler, one router and one mock worker; the load comes from two processes. Timings are for comparison within the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from octavo.cli.load_report import machine, summarise, versions
from octavo.cli.load_run import run_load
from octavo.cli.load_spec import LoadSpec

from bench.running import LEASE, cpu_seconds
from deploy.cluster import LocalCluster

_DOORS = ("http", "grpc")
_RATES = ("output_tokens_per_s", "output_tokens_per_router_cpu_s")


def load(running: LocalCluster, door: str, processes: int, **shape: Any) -> dict[str, Any]:
    """The figures of one closed loop through one door."""
    openai = door == "http"
    addresses = (f"http://{running.gateways[0]}/v1",) if openai else tuple(running.routers)
    spec = LoadSpec(addresses=addresses, openai=openai, model="m", vocab_size=30_000, temperature=0.0, **shape)
    # Processor time, unlike wall-clock time, hardly depends on what else the machine does.
    with cpu_seconds(running) as used:
        figures = summarise(run_load(spec, processes, lambda *_: None))
    if figures["failed"]:
        raise RuntimeError(f"{figures['failed']} requests failed: {figures['first_error']}")
    figures["router_cpu_s"] = used["router-1"]
    figures["output_tokens_per_router_cpu_s"] = figures["output_tokens"] / figures["router_cpu_s"]
    return figures


def streams(running: LocalCluster, repeats: int) -> dict[str, Any]:
    """Tokens/s at 256 streams; the best of the repeats."""
    result: dict[str, Any] = {}
    shape = {"requests": 512, "concurrency": 256, "input_len": 32, "output_len": 512}
    runs: dict[str, list[dict[str, Any]]] = {door: [] for door in _DOORS}
    for repeat in range(repeats + 1):
        for door in _DOORS:
            figures = load(running, door, 2, **shape, seed=repeat)
            kept = ("token_messages", "router_cpu_s", "generator_cpu_share", "ttft_ms", "itl_ms")
            runs[door].append({name: figures[name] for name in (*_RATES, *kept)})
    for door in _DOORS:
        result[door] = {name: max(run[name] for run in runs[door][1:]) for name in _RATES} | {"runs": runs[door]}
    return result


def ttft(running: LocalCluster, repeats: int) -> dict[str, Any]:
    """One request at a time, 200 of them a run; medians, and what HTTP has more."""
    medians: dict[str, list[float]] = {door: [] for door in _DOORS}
    cpu: dict[str, list[float]] = {door: [] for door in _DOORS}
    for repeat in range(repeats + 1):
        for door in _DOORS:
            shape = {"requests": 200, "concurrency": 1, "input_len": 32, "output_len": 4, "warmup": 20}
            figures = load(running, door, 1, **shape, seed=1_000 + repeat)
            medians[door].append(figures["ttft_ms"]["p50"])
            cpu[door].append(1e3 * figures["router_cpu_s"] / (200 + 20))
    best = {door: statistics.median(values[1:]) for door, values in medians.items()}
    return {
        **{f"{door}_ms": best[door] for door in _DOORS},
        "http_adds_ms": best["http"] - best["grpc"],
        "router_cpu_ms_a_request": {door: min(values) for door, values in cpu.items()},
        "all": medians,
    }


def main(arguments: list[str]) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=("streams", "ttft"), default=("streams", "ttft"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    command = " ".join(["python -m bench.http", *arguments])
    report: dict[str, Any] = {"command": command, "machine": machine(), "versions": versions()}
    flags: dict[str, dict[str, Any]] = {"scheduler": LEASE, "router": LEASE, "worker": {**LEASE, "served-name": "m"}}
    with LocalCluster(redis=False, backend="mock", model="mock", flags=flags, timeout=120) as running:
        for name in options.only:
            report[name] = {"streams": streams, "ttft": ttft}[name](running, options.repeats)
            print(f"{name}: {json.dumps(report[name])}", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
