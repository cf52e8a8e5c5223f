"""One step as a timeline, from its plan until its tokens are at the client: as text, and as a trace for ui.perfetto.dev.

    python -m bench.profile MODEL_DIR [--backend cuda] [--rows 1 8 256] [--out FILE] [--trace FILE]

For each number of rows so many streams of 128 + `--tokens` tokens run on a cluster of one scheduler, one worker and one router, whose
processes note where their time goes (--trace-dir). Shown is the step of the median total, the median of each stage over all steps in
which half of the streams or more ran, and how long the device was idle between steps. On the cuda backend the device's part is shown
by kernel for the last number of rows, from a run of bench.gpu_profile before; `--trace` writes the middle steps of that number.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.cli.load_report import describe
from octavo.cli.load_run import LoadResult

from bench.running import cluster, figures_of, head, run
from bench.timeline import Span, Step, find_steps, read_kernels, read_spans
from deploy.cluster import LocalCluster
from deploy.environment import ROOT

PROMPT = 128
_WIDTH = 50
_STEPS_IN_TRACE = 12
_WRITE_SECONDS = 20.0


def measure(running: LocalCluster, directory: Path, rows: int, tokens: int, processes: int) -> dict[str, Any]:
    """Spans and steps of `rows` streams that run at once. Raises RuntimeError where no step can be followed."""
    shape = {"concurrency": rows, "input_len": PROMPT, "output_len": tokens}
    run(running, processes, requests=rows, seed=10_000, **shape)  # graphs, connections, caches
    seed = 20_000 + rows
    result = run(running, processes, requests=rows, seed=seed, **shape)
    figures = figures_of(result)
    _write_traces(running, directory)
    arrivals = _arrivals(result, seed)
    first = min(times[0] for times in arrivals.values())
    spans = [span for span in read_spans(directory) if span.begin > first - 1_000_000_000]
    steps = find_steps(spans, arrivals)
    if not steps:
        raise RuntimeError(f"{rows} rows: no step can be followed from its plan to the client")
    return {"rows": rows, "spans": spans, "arrivals": arrivals, "steps": steps, "itl_ms": figures["itl_ms"]}


def _write_traces(running: LocalCluster, directory: Path) -> None:
    for path in directory.glob("*.json"):
        path.unlink()
    for member in running.members.values():
        os.kill(member.pid, signal.SIGUSR2)
    until = time.monotonic() + _WRITE_SECONDS
    while len(list(directory.glob("*.json"))) < len(running.members):
        if time.monotonic() > until:
            raise RuntimeError(f"a process has not written its spans within {_WRITE_SECONDS:.0f} s")
        time.sleep(0.02)


def _arrivals(result: LoadResult, seed: int) -> dict[int, list[int]]:
    arrivals = {}
    for sample in result.samples:
        at = round(sample["first"] * 1e9)
        times = [at]
        for gap in sample["gaps_us"]:
            at += 1_000 * gap
            times.append(at)
        arrivals[seed + sample["index"]] = times
    return arrivals


def median_step(steps: Sequence[Step]) -> Step:
    """The step of the median total."""
    return sorted(steps, key=lambda step: step.total_us)[len(steps) // 2]


def text(rows: int, steps: Sequence[Step], kernels: Sequence[tuple[str, int, int]] = ()) -> str:
    """The median step as bars over time, with the medians of all; then the device's part by kernel."""
    shown = median_step(steps)
    begin, total = shown.stages[0].begin, shown.total_us
    lines = [
        f"{rows} rows: step {shown.step_id}, {total:,.0f} µs from plan to client; the device idle between steps "
        f"p50 {statistics.median(s.idle_us for s in steps):,.1f} µs; medians of {len(steps)} steps at the right",
        f"{'':34}{'at':>8}{'µs':>8}  {'':{_WIDTH}}{'median':>9}{'p99':>9}",
    ]
    for number, stage in enumerate(shown.stages):
        all_of_it = describe([step.stages[number].us for step in steps])
        assert all_of_it is not None
        at = (stage.begin - begin) / 1e3
        left = min(_WIDTH - 1, int(_WIDTH * at / total))
        bar = " " * left + "█" * max(1, round(_WIDTH * stage.us / total))
        lines.append(
            f"  {stage.where:10}{stage.what:22}{at:8.0f}{stage.us:8.0f}  {bar[:_WIDTH]:{_WIDTH}}"
            f"{all_of_it['p50']:9.1f}{all_of_it['p99']:9.1f}"
        )
    previous = 0
    for name, _, end in kernels:
        lines.append(f"    {'device':8}{name[:40]:42}{previous / 1e3:8.1f} +{(end - previous) / 1e3:6.1f}")
        previous = max(previous, end)
    return "\n".join(lines)


def chrome_trace(found: dict[str, Any], kernels: Sequence[tuple[str, int, int]] = ()) -> dict[str, Any]:
    """The steps around the median one, for Perfetto or chrome://tracing: a process for each of ours, the device and the clients."""
    steps: list[Step] = found["steps"]
    spans: list[Span] = found["spans"]
    at = steps.index(median_step(steps))
    some = steps[max(0, at - _STEPS_IN_TRACE // 2) :][:_STEPS_IN_TRACE]
    begin, end = some[0].stages[0].begin, some[-1].stages[-1].end
    events: list[dict[str, Any]] = []
    pids: dict[str, int] = {}

    def add(process: str, thread: str, what: str, start: int, stop: int, **about: Any) -> None:
        pid = pids.setdefault(process, len(pids) + 1)
        where = {"ph": "X", "pid": pid, "tid": thread, "ts": (start - begin) / 1e3, "dur": (stop - start) / 1e3}
        events.append({"name": what, "args": about, **where})

    for span in spans:
        if span.end < begin or span.begin > end:
            continue
        on_device = span.what == "device"
        # Streams overlap: each its own line.
        thread = f"stream {span.key}" if span.what in ("detokenize", "send") else span.thread
        about = {"step": span.key} if span.key and thread == span.thread else {}
        add(
            "device" if on_device else span.process,
            "steps" if on_device else thread,
            span.what,
            span.begin,
            span.end,
            **about,
        )
        if on_device:
            for name, start, stop in kernels:
                add("device", "kernels (of another run)", name, span.begin + start, span.begin + stop)
    for seed, times in found["arrivals"].items():
        for time_ns in times:
            if begin <= time_ns <= end:
                add("clients", f"stream {seed}", "tokens", time_ns, time_ns + 1_000)
    names = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}} for name, pid in pids.items()]
    return {"displayTimeUnit": "ns", "traceEvents": names + events}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """For the JSON: each stage's quantiles in microseconds, totals, and the device's pauses."""
    steps: list[Step] = found["steps"]
    stages = {
        f"{stage.where}: {stage.what}": describe([step.stages[number].us for step in steps])
        for number, stage in enumerate(steps[0].stages)
    }
    names = [stage.what for stage in steps[0].stages]
    router = [
        sum(s.us for s in step.stages[names.index("receive") : names.index("message to client")]) for step in steps
    ]
    onward = [sum(s.us for s in step.stages[names.index("tokens to router") :]) for step in steps]
    return {
        "rows": found["rows"],
        "steps": len(steps),
        "total_us": describe([step.total_us for step in steps]),
        "device_idle_us": describe([step.idle_us for step in steps]),
        "inside_router_us": describe(router),
        "scheduler_to_client_us": describe(onward),
        "itl_ms": found["itl_ms"],
        "stages_us": stages,
    }


def kernels_of(model: str, rows: int, scratch: Path) -> list[tuple[str, int, int]]:
    """The kernels of a step, from bench.gpu_profile in a process of its own: the card holds one such model at a time."""
    path = scratch / "kernels.json"
    command = [sys.executable, "-m", "bench.gpu_profile", model, "--rows", str(rows), "--trace", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return read_kernels(path)


def main(arguments: list[str]) -> None:
    """Measure, print, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--backend", default="auto", choices=("auto", "cuda", "torch", "mock"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 256])
    parser.add_argument("--tokens", type=int, default=256, help="output tokens of each stream")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="of the load generator")
    parser.add_argument("--worker", nargs="*", default=[], metavar="FLAG=VALUE", help="flags of the worker")
    parser.add_argument("--env", nargs="*", default=[], metavar="NAME=VALUE", help="variables of all services")
    parser.add_argument("--no-kernels", action="store_true", help="cuda: leave the kernels out")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace of the last of --rows here")
    options = parser.parse_args(arguments)
    backend = "mock" if options.model_dir == "mock" else options.backend
    name = Path(options.model_dir).name
    shown = [name if argument == options.model_dir else argument for argument in arguments]
    report = {**head("bench.profile", shown), "model": name, "backend": backend, "profiles": []}
    with tempfile.TemporaryDirectory(prefix="octavo-trace-") as scratch:
        with_kernels = backend == "cuda" and not options.no_kernels
        last = options.rows[-1]
        kernels = {last: kernels_of(options.model_dir, last, Path(scratch))} if with_kernels else {}
        traces = Path(scratch) / "spans"
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in options.worker)
        env = dict(variable.split("=", 1) for variable in options.env)
        with cluster(options.model_dir, backend, flags, everyone={"trace-dir": str(traces)}, env=env) as running:
            for rows in options.rows:
                found = measure(running, traces, rows, options.tokens, options.processes)
                print(text(rows, found["steps"], kernels.get(rows, ())), flush=True)
                report["profiles"].append(summary(found))
        if options.trace is not None:
            options.trace.parent.mkdir(parents=True, exist_ok=True)
            options.trace.write_text(json.dumps(chrome_trace(found, kernels.get(rows, ()))), encoding="utf-8")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
