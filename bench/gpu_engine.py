"""Offline figures of the cuda backend on one GPU, as JSON: one stream, batches, first token of a long prompt, start-up.

    python -m bench.gpu_engine MODEL_DIR|NAME [--out FILE] [--workloads w1,w2-64,w2-256,w4-8192,w4-32768]

NAME is one of bench/gpu_models.py (random weights, fixed seed), written below --models. W1: one stream, 128 + 512 tokens.
W2: n streams of 128 + 256. W4: the first token of a prompt of n tokens. Greedy; each workload once to warm up, then three times,
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

import torch

from bench.gpu_models import SHAPES, write_model
from bench.gpu_offline import OfflineEngine, Request, Run
from kernels.compiler import nvrtc_version
from worker.backends.cuda_backend import CudaBackend, CudaSettings

REPEATS = 3


def requests_of(workload: str, vocab_size: int, repeat: int) -> list[Request]:
    """The workload's requests; each repeat has other tokens of the same lengths."""
    kind, _, size = workload.partition("-")
    count, prompt, outputs = {"w1": (1, 128, 512), "w2": (int(size or 1), 128, 256), "w4": (1, int(size or 1), 1)}[kind]
    generator = random.Random(repeat)
    return [Request([generator.randrange(vocab_size) for _ in range(prompt)], outputs) for _ in range(count)]


def measure(engine: OfflineEngine, workload: str, vocab_size: int) -> dict[str, Any]:
    """Figures of one workload: the best of the repeats, and the time of each."""
    runs: list[tuple[Run, list[Request]]] = []
    for repeat in range(REPEATS + 1):
        requests = requests_of(workload, vocab_size, repeat)
        runs.append((engine.run(requests), requests))
    best, requests = min(runs[1:], key=lambda pair: pair[0].seconds)
    first = requests[0].first_token_s
    return {
        "seconds": best.seconds,
        "all_seconds": [run.seconds for run, _ in runs[1:]],
        "tokens_per_s": best.output_tokens / best.seconds,
        "first_token_ms": 1e3 * first,
        "ms_per_step_after_first": 1e3 * (best.seconds - first) / max(1, best.steps - 1),
        "device_ms_per_step": 1e3 * best.device_s / best.steps,
        "gap_ms_per_step": 1e3 * best.gap_s / best.steps,
        "steps": best.steps,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workloads", default="w1,w2-64,w2-256,w4-8192")
    parser.add_argument("--max-model-len", type=int, default=40_960)
    arguments = parser.parse_args()
    directory = write_model(arguments.models, arguments.model) if arguments.model in SHAPES else Path(arguments.model)
    began = time.perf_counter()
    backend = CudaBackend(directory, CudaSettings(max_model_len=arguments.max_model_len, memory_fraction=0.8))
    info = backend.load(lambda what, done, total: None)
    loaded = time.perf_counter()
    backend.warm_up()
    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "model": arguments.model,
        "device": properties.name,
        "versions": {"torch": torch.__version__, "nvrtc": nvrtc_version(), "python": platform.python_version()},
        "load_s": loaded - began,
        "warm_up_s": time.perf_counter() - loaded,
        "numerics": info.numerics,
        "num_blocks": info.kv_groups[0].num_blocks,
    }
    engine = OfflineEngine(backend, info)
    for workload in arguments.workloads.split(","):
        report[workload] = measure(engine, workload, info.vocab_size)
        print(workload, json.dumps({k: v for k, v in report[workload].items() if k != "all_seconds"}), flush=True)
    backend.close()
    text = json.dumps(report, indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
