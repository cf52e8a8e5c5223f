"""Where a decode step's time goes, kernel by kernel: a table, JSON with --out, and a Perfetto trace with --trace.

    python -m bench.gpu_profile MODEL_DIR|NAME [--rows 1,64,256] [--context 512] [--out FILE] [--trace FILE]

With programmatic dependent launch kernels overlap: each starts early and waits for the one before. So a kernel is charged with the
time between the end of the kernel before it and its own end; the charges of a step sum to its length on the device. The profiler
itself costs a little: compare shares, and take lengths from bench.gpu_engine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.gpu_models import SHAPES, write_model
from bench.gpu_offline import OfflineEngine, Request
from worker.backend import BackendInfo
from worker.backends.cuda_backend import CudaBackend
from worker.backends.cuda_settings import CudaSettings

STEPS = 16
FIRST_KERNEL = "prepare_tokens"


def trace_of(engine: OfflineEngine, rows: int, context: int, info: BackendInfo, path: Path) -> None:
    """Profile `rows` requests that end at about `context` tokens, into a Chrome trace.

    Their prompts take several steps together; the first of them still runs when the last one has begun and STEPS more are done.
    """
    generator = random.Random(rows)
    num_outputs = STEPS + 8 + rows * context // info.max_num_batched_tokens

    def requests(outputs: int) -> list[Request]:
        texts = [[generator.randrange(info.vocab_size) for _ in range(max(1, context - outputs))] for _ in range(rows)]
        return [Request(text, outputs) for text in texts]

    engine.run(requests(4))  # captures the graphs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        engine.run(requests(num_outputs))
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


def charges(path: Path, rows: int) -> dict[str, Any]:
    """Per kernel name: launches a step and microseconds a step, from a trace: medians of the STEPS after the last prompt's."""
    events = json.loads(path.read_text())["traceEvents"]
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    device.sort(key=lambda e: e["ts"] + e["dur"])
    starts = [i for i, e in enumerate(device) if e["name"] == FIRST_KERNEL]
    steps = list(pairwise(starts))
    of_prompts = [
        n for n, (first, after) in enumerate(steps) if any("prefill" in e["name"] for e in device[first:after])
    ]
    begin = max(of_prompts, default=0) + 3  # the graphs are warm
    steps = steps[begin : begin + STEPS]
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    launches: dict[str, float] = defaultdict(float)
    lengths = []
    for number, (first, after) in enumerate(steps):
        began = previous = device[first - 1]["ts"] + device[first - 1]["dur"]
        for event in device[first:after]:
            end = event["ts"] + event["dur"]
            by_name[event["name"]][number] += end - previous
            launches[event["name"]] += 1 / len(steps)
            previous = end
        lengths.append(previous - began)
    kernels = [
        {"name": name[:60], "launches": round(launches[name], 1), "us": round(statistics.median(values), 1)}
        for name, values in by_name.items()
    ]
    kernels.sort(key=lambda kernel: -float(str(kernel["us"])))
    return {"rows": rows, "step_us": round(statistics.median(lengths), 1), "steps": len(steps), "kernels": kernels}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--rows", default="1,64,256")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trace", type=Path, help="the trace of the last of --rows, for ui.perfetto.dev")
    arguments = parser.parse_args()
    directory = write_model(arguments.models, arguments.model) if arguments.model in SHAPES else Path(arguments.model)
    backend = CudaBackend(directory, CudaSettings(max_model_len=8192, memory_fraction=0.8))
    info = backend.load(lambda what, done, total: None)
    backend.warm_up()
    engine = OfflineEngine(backend, info)
    report: dict[str, Any] = {
        "command": f"python -m bench.gpu_profile {arguments.model} --rows {arguments.rows} --context {arguments.context}",
        "device": torch.cuda.get_device_properties(0).name,
        "versions": {"torch": torch.__version__},
        "steps": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for rows in map(int, arguments.rows.split(",")):
            path = arguments.trace or Path(scratch) / "trace.json"
            trace_of(engine, rows, arguments.context, info, path)
            step = charges(path, rows)
            report["steps"].append(step)
            print(f"{rows} rows: {step['step_us']} us a step")
            for kernel in step["kernels"]:
                print(f"  {kernel['us']:8.1f} us {kernel['launches']:6.1f} x  {kernel['name']}", flush=True)
    backend.close()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
