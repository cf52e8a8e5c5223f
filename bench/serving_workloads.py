"""W1 to W6 (bench/workloads.py) through gRPC, on a cluster of processes of their own, as one table with what others reach:

    python -m bench.serving_workloads MODEL_DIR [--backend cuda] [--routers 1] [--processes 4] [--repeats 3] [--out FILE]

Several processes generate the load. Each workload runs once to warm up, then `--repeats` times with other token ids; the best run
counts (most tokens a second, or the shortest), and all are in the file. The floor, vLLM's figures and the goals are those of the
Llama-3.2-1B and 3.1-8B shapes on one H100; a directory of the name `llama-1b` or `llama-8b` is held against them. `--shrink`
divides counts and lengths, to try it on a small machine (MODEL_DIR may be `mock`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.cli.load_spec import body
from octavo.client import Client
from octavo.v1 import inference_pb2

from bench.running import cluster, cpu_seconds, figures_of, head, only_model, run
from bench.workloads import NAMES, Bar, Workload, bars, make_workload
from deploy.cluster import LocalCluster

_BY_SECONDS = ("w1", "w5", "w6-one")
_BY_TTFT = ("w4-8192", "w4-32768", "w6-32")


def measure(running: LocalCluster, workload: Workload, processes: int) -> dict[str, Any]:
    """One run: the figures that the bars are about, those of the load generator, and the load of each process of the cluster."""
    bodies = tuple(
        body(_request(workload, prompt, length, seed))
        for seed, (prompt, length) in enumerate(zip(workload.prompts, workload.output_lens, strict=True))
    )
    shape = {"requests": len(bodies), "concurrency": workload.concurrency, "rate": workload.rate, "bodies": bodies}
    with cpu_seconds(running) as used:
        figures = figures_of(run(running, processes, **shape))
    wanted = sum(workload.output_lens)
    if figures["output_tokens"] != wanted:
        raise RuntimeError(f"{workload.name}: {figures['output_tokens']} tokens where {wanted} were asked for")
    seconds = figures["duration_s"]
    ttft, itl, tpot = figures["ttft_ms"], figures["itl_ms"], figures["tpot_ms"]
    return {
        "seconds": seconds,
        "tokens_per_s": figures["output_tokens_per_s"],
        "ms_per_token": tpot and tpot["p50"],
        **{f"ttft_{share}_ms": ttft[share] for share in ("p50", "p90", "p99")},
        **{f"itl_{share}_ms": itl and itl[share] for share in ("p50", "p90", "p99")},
        "tokens_per_message": figures["output_tokens"] / figures["token_messages"],
        "sent_late_p99_ms": figures["lag_ms"]["p99"],
        "generator_processes": figures["generator_processes"],
        "generator_cpu_share": figures["generator_cpu_share"],
        # Starting the generators is in the processor time and not in the seconds.
        "cpu_share": {name: value / seconds for name, value in used.items()},
    }


def best(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run that counts."""
    if name in _BY_SECONDS:
        return min(runs, key=lambda one: float(one["ms_per_token" if name != "w5" else "seconds"] or 0.0))
    if name in _BY_TTFT:
        return min(runs, key=lambda one: float(one["ttft_p50_ms"]))
    return max(runs, key=lambda one: float(one["tokens_per_s"]))


def table(found: dict[str, dict[str, Any]], against: tuple[Bar, ...]) -> str:
    """Our figures beside floor, vLLM and goals; without bars, the figures alone."""
    lines = []
    if against:
        lines.append(f"{'':22}{'ours':>10}{'floor':>10}{'vLLM':>10}{'ratio':>8}{'goal':>10}{'stretch':>10}")
    for bar in against:
        if bar.workload not in found:
            continue
        ours = float(found[bar.workload]["best"][bar.figure])
        reached = ours >= bar.goal if bar.higher_is_better else ours <= bar.goal
        ratio = "" if bar.vllm is None else f"{ours / bar.vllm if bar.higher_is_better else bar.vllm / ours:.2f}x"
        cells = "".join(f"{_number(value):>10}" for value in (ours, bar.floor, bar.vllm))
        goals = "".join(f"{_number(value):>10}" for value in (bar.goal, bar.stretch))
        name = f"{bar.workload} {bar.figure.removesuffix('_ms').replace('ms_per_token', 'a token')} {bar.unit}"
        lines.append(f"{name:22}{cells}{ratio:>8}{goals}  {'reached' if reached else 'MISSED'}")
    lines.append(
        f"{'':10}{'tokens/s':>10}{'ms/token':>10}{'TTFT p50':>10}{'p99':>10}{'ITL p50':>10}{'p99':>10}{'seconds':>9}  cpu"
    )
    for name, entry in found.items():
        one = entry["best"]
        columns = ("tokens_per_s", "ms_per_token", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
        cells = "".join(f"{_number(one[column]):>10}" for column in columns)
        shares = ", ".join(f"{member} {share:.0%}" for member, share in one["cpu_share"].items())
        lines.append(f"{name:10}{cells}{one['seconds']:>9.3f}  {shares}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _request(workload: Workload, prompt: list[int], length: int, seed: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        model="m",
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=inference_pb2.SamplingParams(
            max_tokens=length, ignore_eos=True, temperature=workload.temperature, seed=seed
        ),
    )


def measure_all(
    running: LocalCluster, names: list[str], repeats: int, processes: int, shrink: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each workload on a cluster that runs: its name, the best run and all of them. What exceeds the model's context is left out."""
    with Client(running.routers) as client:
        model = only_model(client)
    for name in names:
        runs = []
        for repeat in range(repeats + 1):
            workload = make_workload(name, repeat, model.vocab_size, shrink)
            if not repeat and workload.rate is not None:
                workload = workload.first(1 + len(workload.prompts) // 8)  # an open loop takes its time
            longest = max(len(p) + n for p, n in zip(workload.prompts, workload.output_lens, strict=True))
            if longest > model.max_model_len:
                print(f"{name}: {longest} tokens do not fit into {model.max_model_len}", file=sys.stderr)
                break
            runs.append(measure(running, workload, processes))
        else:
            yield name, {"best": best(name, runs[1:]), "runs": runs[1:], "warm_up": runs[0]}


def main(arguments: list[str]) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--backend", default="auto", choices=("auto", "cuda", "torch", "mock"))
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="of the load generator")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shrink", type=int, default=1, help="divide counts and lengths")
    parser.add_argument("--worker", nargs="*", default=[], metavar="FLAG=VALUE", help="flags of the worker")
    parser.add_argument("--env", nargs="*", default=[], metavar="NAME=VALUE", help="variables of all services")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    options = parser.parse_args(arguments)
    backend = "mock" if options.model_dir == "mock" else options.backend
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in options.worker)
    env = dict(variable.split("=", 1) for variable in options.env)
    name = Path(options.model_dir).name
    shown = [name if argument == options.model_dir else argument for argument in arguments]
    found: dict[str, Any] = {}
    report = {**head("bench.serving_workloads", shown), "model": name, "backend": backend, "routers": options.routers}
    began = time.monotonic()
    with cluster(options.model_dir, backend, flags, routers=options.routers, env=env) as running:
        report |= {"start_s": time.monotonic() - began, "flags": flags, "env": env, "workloads": found}
        for workload, figures in measure_all(
            running, options.workloads, options.repeats, options.processes, options.shrink
        ):
            found[workload] = figures
            print(f"{workload}: {json.dumps(figures['best'])}", flush=True)
            if options.out is not None:  # after each: whoever runs out of time has what was measured
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(found, bars(name) if options.shrink == 1 else ()))


if __name__ == "__main__":
    main(sys.argv[1:])
