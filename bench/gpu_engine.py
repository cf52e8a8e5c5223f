"""Offline figures of the cuda backend on one GPU, as JSON: one stream, batches, first token of a long prompt, start-up.

    python -m bench.gpu_engine MODEL_DIR|NAME [--out FILE] [--workloads w1,w2-64,w3,w4-8192,...] [--alone]

NAME is one of bench/gpu_models.py (random weights, fixed seed), written below --models. W1: one stream, 128 + 512 tokens.
W2: n streams of 128 + 256. W3: 256 requests of 100 to 1,024 tokens in and out, temperature 0.6 (nano-vllm's bench.py, the same
draws). W4: the first token of a prompt of n tokens. W5: 128 requests of 64 + 64 tokens behind a shared prefix of 2,048, which is
computed once, at the start (--alone: each row reads it by itself). Greedy but W3; each workload once to warm up, then three times,
the best counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_models import SHAPES, write_model
from bench.gpu_offline import OfflineEngine, Request, Run
from kernels.compiler import nvrtc_version
from worker.backends.cuda_backend import CudaBackend
from worker.backends.cuda_settings import CudaSettings
from worker.step import SamplingParams

REPEATS = 3


def requests_of(workload: str, vocab_size: int, repeat: int) -> list[Request]:
    """The workload's requests; each repeat has other tokens of the same lengths."""
    kind, _, size = workload.partition("-")
    if kind == "w3":
        return _mixed_requests()
    count, prompt, outputs = {"w1": (1, 128, 512), "w2": (int(size or 1), 128, 256), "w4": (1, int(size or 1), 1)}[kind]
    generator = random.Random(repeat)
    return [Request([generator.randrange(vocab_size) for _ in range(prompt)], outputs) for _ in range(count)]


def _mixed_requests() -> list[Request]:
    generator = random.Random(0)
    prompts = [[generator.randint(0, 10_000) for _ in range(generator.randint(100, 1024))] for _ in range(256)]
    sampling = SamplingParams(temperature=0.6)
    return [Request(text, generator.randint(100, 1024), sampling, seed=i) for i, text in enumerate(prompts)]


def _run(engine: OfflineEngine, workload: str, vocab_size: int, repeat: int) -> tuple[Run, list[Request]]:
    if workload != "w5":
        requests = requests_of(workload, vocab_size, repeat)
        return engine.run(requests), requests
    generator = random.Random(5000 + repeat)
    prefix = [generator.randrange(vocab_size) for _ in range(2048)]
    blocks = engine.num_blocks(len(prefix))
    first = engine.run([Request(prefix, 1)])  # takes the first blocks
    requests = [
        Request(
            prefix + [generator.randrange(vocab_size) for _ in range(64)],
            64,
            computed=len(prefix),
            blocks=list(range(blocks)),
            shared=blocks,
        )
        for _ in range(128)
    ]
    run = engine.run(requests, order=list(range(blocks, blocks + 128 * engine.num_blocks(128))))
    run.seconds += first.seconds
    run.steps += first.steps
    return run, requests


def measure(engine: OfflineEngine, workload: str, vocab_size: int, repeats: int = REPEATS) -> dict[str, Any]:
    """Figures of one workload: the best of the repeats, and the time of each."""
    runs: list[tuple[Run, list[Request]]] = []
    for repeat in range(repeats + 1):
        runs.append(_run(engine, workload, vocab_size, repeat))
    best, requests = min(runs[1:] or runs, key=lambda pair: pair[0].seconds)
    first = requests[0].first_token_s
    return {
        "seconds": best.seconds,
        "all_seconds": [run.seconds for run, _ in runs[1:] or runs],
        "tokens_per_s": best.output_tokens / best.seconds,
        "first_token_ms": 1e3 * first,
        "ms_per_step_after_first": 1e3 * (best.seconds - first) / max(1, best.steps - 1),
        "device_ms_per_step": 1e3 * best.device_s / best.steps,
        "gap_us_p50": 1e6 * float(np.percentile(best.gaps_s or [0.0], 50)),
        "gap_us_p99": 1e6 * float(np.percentile(best.gaps_s or [0.0], 99)),
        "steps": best.steps,
    }


def driver_version() -> str:
    """As /proc shows it, such as "580.159.04"."""
    text = Path("/proc/driver/nvidia/version").read_text() if Path("/proc/driver/nvidia/version").exists() else ""
    return next((word for word in text.split() if word[:1].isdigit() and "." in word), "unknown")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workloads", default="w1,w2-8,w2-64,w2-256,w3,w4-8192,w4-32768,w5")
    parser.add_argument("--max-model-len", type=int, default=40_960)
    parser.add_argument("--alone", action="store_true", help="rows behind one prefix do not read it together")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="0: once, without a run to warm up")
    arguments = parser.parse_args()
    directory = write_model(arguments.models, arguments.model) if arguments.model in SHAPES else Path(arguments.model)
    began = time.perf_counter()
    once = arguments.repeats == 0
    settings = CudaSettings(
        max_model_len=arguments.max_model_len,
        memory_fraction=0.8,
        capture_at_start=once,
        shared_prefix=not arguments.alone,
    )
    backend = CudaBackend(directory, settings)
    info = backend.load(lambda what, done, total: None)
    loaded = time.perf_counter()
    backend.warm_up()
    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "command": f"python -m bench.gpu_engine {arguments.model} --workloads {arguments.workloads} --repeats {arguments.repeats}"
        + " --alone" * arguments.alone,
        "model": arguments.model,
        "device": properties.name,
        "versions": {
            "driver": driver_version(),
            "torch": torch.__version__,
            "nvrtc": nvrtc_version(),
            "python": platform.python_version(),
        },
        "load_s": loaded - began,
        "warm_up_s": time.perf_counter() - loaded,
        "numerics": info.numerics,
        "num_blocks": info.kv_groups[0].num_blocks,
    }
    engine = OfflineEngine(backend, info)
    for workload in arguments.workloads.split(","):
        report[workload] = measure(engine, workload, info.vocab_size, arguments.repeats)
        print(workload, json.dumps({k: v for k, v in report[workload].items() if k != "all_seconds"}), flush=True)
    backend.close()
    text = json.dumps(report, indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
