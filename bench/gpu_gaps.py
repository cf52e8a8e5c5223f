"""How long the device pauses between two steps, over many steps, as JSON: rows alone and at 256, with and without arrivals.

    python -m bench.gpu_gaps MODEL_DIR|NAME [--steps 10000] [--out FILE]

From one step's last event on the device to the next one's first. Without arrivals: steps that bring no new row, in batches whose
requests begin and end together; with arrivals: a request that ends is followed by another at once, so that about every second step
brings a prompt. The engine is bench/gpu_offline.py's, two steps ahead; through the services the same times are the worker's metric
octavo_worker_gap_seconds.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_engine import driver_version
from bench.gpu_models import SHAPES, write_model
from bench.gpu_offline import OfflineEngine, Request
from worker.backends.cuda_backend import CudaBackend
from worker.backends.cuda_settings import CudaSettings

OUTPUTS = 512
PROMPT = 16


def gaps_of(engine: OfflineEngine, rows: int, steps: int, arrivals: bool, vocab_size: int) -> dict[str, Any]:
    """Percentiles over the gaps of at least `steps` steps, in microseconds."""
    generator = random.Random(rows)
    found: list[float] = []
    while len(found) < steps:
        # Staggered lengths spread the ends, and so the arrivals that follow them.
        count = max(rows, rows * steps // OUTPUTS) if arrivals else rows
        lengths = [generator.randint(2, 2 * OUTPUTS) if arrivals else OUTPUTS for _ in range(count)]
        requests = [Request([generator.randrange(vocab_size) for _ in range(PROMPT)], length) for length in lengths]
        run = engine.run(requests)
        found += [gap for gap, new in zip(run.gaps_s, run.arrivals, strict=True) if arrivals or not new]
    p50, p99, most = np.percentile(np.array(found) * 1e6, (50, 99, 100))
    result = {"rows": rows, "arrivals": arrivals, "steps": len(found)}
    return result | {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1), "max_us": round(float(most), 1)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    directory = write_model(arguments.models, arguments.model) if arguments.model in SHAPES else Path(arguments.model)
    backend = CudaBackend(directory, CudaSettings(max_model_len=8192, memory_fraction=0.8))
    info = backend.load(lambda what, done, total: None)
    backend.warm_up()
    engine = OfflineEngine(backend, info)
    report: dict[str, Any] = {
        "command": f"python -m bench.gpu_gaps {arguments.model} --steps {arguments.steps}",
        "device": torch.cuda.get_device_properties(0).name,
        "versions": {"driver": driver_version(), "torch": torch.__version__},
        "gaps": [],
    }
    gaps_of(engine, 256, 1, True, info.vocab_size)  # captures the graphs
    for rows, arrivals in ((1, False), (256, False), (256, True)):
        gaps = gaps_of(engine, rows, arguments.steps, arrivals, info.vocab_size)
        report["gaps"].append(gaps)
        print(json.dumps(gaps), flush=True)
    backend.close()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
