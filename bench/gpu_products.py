"""Products of 24 to 512 rows by cuBLAS, ours beside them, and where cuBLAS should be asked for more rows than there are.

    python -m bench.gpu_products llama-1b|llama-8b [--out FILE]

cuBLAS chooses a kernel by the number of rows, and not always well: for 224 rows a product may take longer than for 256. The table that
comes last is what kernels/product_rows.py holds. Microseconds of one product, from replays of graphs over the weights of several
layers, more than the L2 cache holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu_engine import driver_version
from bench.gpu_kernel_times import Body, make_ops, random, seconds_of
from bench.gpu_kernels import LLAMA_1B, LLAMA_8B, VOCAB
from kernels.ops import KernelOps
from kernels.shapes import KernelShape
from worker.backends.cuda_graphs import buckets

SHAPES = {"llama-1b": LLAMA_1B, "llama-8b": LLAMA_8B}
ROWS = (24, 32, 48, 64, *range(72, 257, 8), *range(272, 513, 16))
WORTH = 0.95  # of the time at the number of rows itself: in a step less may turn round (1B, DOWN of 256 rows as 288: 2 % less alone)
L2_BYTES = 128 << 20


def times(ops: KernelOps, shape: KernelShape) -> dict[str, dict[int, float]]:
    """Microseconds by product and rows: of cuBLAS, and under a name of its own of ours."""
    hidden, most = shape.hidden_size, max(ROWS)
    sizes = {
        "QKV": (shape.qkv_size, hidden),
        "O": (hidden, shape.q_size),
        "GATE_UP": (2 * shape.intermediate_size, hidden),
        "DOWN": (hidden, shape.intermediate_size),
        "HEAD": (VOCAB, hidden),
    }
    x = {k: random(most, k) for k in {hidden, shape.q_size, shape.intermediate_size}}
    activated = random(most, shape.intermediate_size)
    parts = torch.empty(8 * 64 * max(shape.qkv_size, hidden), dtype=torch.float32, device="cuda")
    logits = torch.empty((most, VOCAB), dtype=torch.float32, device="cuda")
    found: dict[str, dict[int, float]] = {}

    def measure(name: str, rows: int, body: Callable[..., object], weights: list[torch.Tensor], *rest: Any) -> None:
        bodies: list[Body] = [partial(body, weight, *rest) for weight in weights]
        found.setdefault(name, {})[rows] = round(1e6 * seconds_of(bodies * 2), 2)

    for name, (n, k) in sizes.items():
        weights = [random(n, k) for _ in range(1 + 2 * L2_BYTES // (2 * n * k))]
        out = random(most, n) if name != "HEAD" else logits
        precision = {} if name != "HEAD" else {"out_dtype": torch.float32}

        def cublas(weight: torch.Tensor, rows: int, k: int = k, out: Any = out, precision: Any = precision) -> None:
            torch.mm(x[k][:rows], weight.t(), out=out[:rows], **precision)

        for rows in ROWS:
            measure(name, rows, cublas, weights, rows)
            if name == "GATE_UP":
                measure("silu_mul", rows, lambda _, *rest: ops.silu_mul(*rest), weights, out, None, activated, rows)
                if ops.fits_gemm(rows):
                    measure("GATE_UP with silu, ours", rows, ops.gemm_silu, weights, None, x[k], activated, rows)
            elif ops.fits_parts(rows):
                ours, to = (ops.gemm_float, logits) if name == "HEAD" else (ops.gemm_parts, parts)
                measure(f"{name}, ours", rows, ours, weights, x[k], to, rows)
        print(json.dumps({name: found[name] for name in found}), flush=True)
    return found


def paddings(of: dict[int, float]) -> dict[int, int]:
    """For a captured number of rows the larger one that cuBLAS takes less time for, where there is one."""
    best = {
        rows: min((more for more in of if more >= rows), key=of.__getitem__)
        for rows in buckets(max(ROWS))
        if rows in of and rows > 64
    }
    return {rows: more for rows, more in best.items() if of[more] < WORTH * of[rows]}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model]
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        found = times(make_ops(shape), shape)
    table = {name: paddings(found[name]) for name in ("QKV", "O", "GATE_UP", "DOWN", "HEAD")}
    print(table)
    report = {
        "command": f"python -m bench.gpu_products {arguments.model} --out FILE",
        "device": torch.cuda.get_device_name(0),
        "versions": {"torch": torch.__version__, "driver": driver_version()},
        "us": found,
        "rows that cuBLAS is asked for": table,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
