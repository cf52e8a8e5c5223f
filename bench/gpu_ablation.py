"""What each technique of the decode step brings: one workload with all of them, then with one switched off. JSON to --out.

    python -m bench.gpu_ablation MODEL_DIR|NAME [--workload w1] [--off NAME,...] [--out FILE]

The workloads are those of bench/gpu_engine.py; a step's length is its best of three runs.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu_engine import measure
from bench.gpu_models import SHAPES, write_model
from bench.gpu_offline import OfflineEngine
from kernels import ops, product_ops, shapes
from kernels.launcher import KernelLibrary
from worker.backends import cuda_backend
from worker.backends.cuda_backend import CudaBackend
from worker.backends.cuda_settings import CudaSettings


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """`owner`.`name` is `value` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def without_overlap(library: Callable[..., KernelLibrary]) -> Callable[..., KernelLibrary]:
    """A KernelLibrary that launches each kernel when the one before has ended."""
    return lambda compiler, specs, device, overlap: library(compiler, specs, device, overlap=False)


SWITCHES: dict[str, tuple[object, str, object]] = {
    "all": (product_ops, "FUSED_ROWS", shapes.FUSED_ROWS),
    "norms as kernels": (ops.KernelOps, "fits_fused", lambda self, tokens: False),
    "cuBLAS from 17 rows": (ops.KernelOps, "fits_gemm", lambda self, tokens: False),
    "no dependent launch": (cuda_backend, "KernelLibrary", without_overlap(KernelLibrary)),
    "no shared prefix": (product_ops, "FUSED_ROWS", shapes.FUSED_ROWS),
    "no graphs": (product_ops, "FUSED_ROWS", shapes.FUSED_ROWS),
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--workload", default="w1")
    parser.add_argument("--off", default=",".join(SWITCHES), help="which of the switches")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    directory = write_model(arguments.models, arguments.model) if arguments.model in SHAPES else Path(arguments.model)
    report: dict[str, Any] = {
        "command": f"python -m bench.gpu_ablation {arguments.model} --workload {arguments.workload} --off '{arguments.off}'",
        "device": torch.cuda.get_device_properties(0).name,
        "ms_per_step": {},
    }
    for name in arguments.off.split(","):
        with replaced(*SWITCHES[name]):
            settings = CudaSettings(
                max_model_len=8192,
                memory_fraction=0.8,
                graphs=name != "no graphs",
                shared_prefix=name != "no shared prefix",
            )
            backend = CudaBackend(directory, settings)
            info = backend.load(lambda what, done, total: None)
            backend.warm_up()
            figures = measure(OfflineEngine(backend, info), arguments.workload, info.vocab_size)
            backend.close()
            del backend
            gc.collect()
            torch.cuda.empty_cache()
        report["ms_per_step"][name] = round(figures["ms_per_step_after_first"], 4)
        print(name, report["ms_per_step"][name], flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
