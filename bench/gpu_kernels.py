"""Kernel by kernel: time, bytes or operations, and the share of what this device can do, measured in the same run. JSON to --out.

    python -m bench.gpu_kernels [--groups products,small,sampling,attention,prefix] [--out FILE]

Each figure is the median of graph replays; inputs rotate where they would otherwise stay in the cache. Shapes are those of
Llama-3.2-1B unless a name says 8b.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_attention_kernels import attention, behind_prefix
from bench.gpu_kernel_times import Bench, make_ops, random
from kernels.ops import KernelOps
from kernels.product_rows import PARTS_ROWS
from kernels.shapes import KernelShape
from worker.backends.cuda_rows import DeviceRows
from worker.backends.cuda_sampler import CudaSampler
from worker.step import NewRow, SamplingParams, Step

LLAMA_1B = KernelShape(2048, 8192, 32, 8, 64, 16, qk_norm=False, float16=False)
LLAMA_8B = KernelShape(4096, 14336, 32, 8, 128, 16, qk_norm=False, float16=False)
VOCAB = 128_256


def products(bench: Bench, ops: KernelOps) -> None:
    """All matrix products of one step, ours against cuBLAS."""
    sizes = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)]
    layers = [[random(*size) for size in sizes] for _ in range(16)]
    head = random(VOCAB, 2048)
    weights = [weight for layer in layers for weight in layer]
    total = 2.0 * (sum(weight.numel() for weight in weights) + head.numel())
    for tokens in (1, 2, 4, 8, 16):
        x = {2048: random(16, 2048), 8192: random(16, 8192)}
        outs = {n: random(16, n) for n in (3072, 2048, 16384)}
        logits = torch.empty((16, VOCAB), dtype=torch.float32, device="cuda")

        def ours(tokens: int = tokens, x: Any = x, outs: Any = outs, logits: Any = logits) -> None:
            for weight in weights:
                ops.matvec(weight, x[weight.shape[1]], outs[weight.shape[0]], tokens)
            ops.matvec_float(head, x[2048], logits, tokens)

        def library(tokens: int = tokens, x: Any = x, outs: Any = outs, logits: Any = logits) -> None:
            for weight in weights:
                torch.mm(x[weight.shape[1]][:tokens], weight.t(), out=outs[weight.shape[0]][:tokens])
            torch.mm(x[2048][:tokens], head.t(), out_dtype=torch.float32, out=logits[:tokens])

        bench.add(f"all products, {tokens} rows, matvec", [ours], total)
        bench.add(f"all products, {tokens} rows, cuBLAS", [library], total)
    _tensor_core_products(bench, ops, layers, head)
    x1, out1 = random(16, 2048), random(16, 16384)
    for index, (n, k) in enumerate(sizes):
        xk = x1 if k == 2048 else random(16, 8192)
        bodies = [partial(ops.matvec, layer[index], xk, out1, 1) for layer in layers]
        bench.add(f"matvec {n}x{k}, 1 row", bodies, 2.0 * n * k)


def _tensor_core_products(bench: Bench, ops: KernelOps, layers: list[list[torch.Tensor]], head: torch.Tensor) -> None:
    """One after the other what a step of many rows multiplies: gemm_wgmma.cu, whose gate_up ends with silu(gate) * up, and cuBLAS."""
    x = {2048: random(256, 2048), 8192: random(256, 8192)}
    outs = {n: random(256, n) for n in (3072, 2048, 16384)}
    parts, act = torch.empty((8, 256, 3072), dtype=torch.float32, device="cuda"), random(256, 8192)
    logits = torch.empty((256, VOCAB), dtype=torch.float32, device="cuda")
    for tokens in (32, 64, 128):
        for index, name in enumerate(("QKV", "O", "GATE_UP", "DOWN")):
            weights = [layer[index] for layer in layers]
            n, k = weights[0].shape
            ours = [
                partial(ops.gemm_silu, weight, None, x[k], act, tokens)
                if name == "GATE_UP"
                else partial(ops.gemm_parts, weight, x[k], parts, tokens)
                for weight in weights
            ]
            library = [partial(torch.mm, x[k][:tokens], weight.t(), out=outs[n][:tokens]) for weight in weights]
            if name == "GATE_UP" or tokens <= PARTS_ROWS:
                bench.add(f"{name}, {tokens} rows, gemm", ours, 2.0 * n * k)
            bench.add(f"{name}, {tokens} rows, cuBLAS", library, 2.0 * n * k)
        out = logits[:tokens]
        if tokens <= PARTS_ROWS:
            ours = [partial(ops.gemm_float, head, x[2048], logits, tokens)]
            bench.add(f"head, {tokens} rows, gemm", ours, 2.0 * head.numel())
        bench.add(
            f"head, {tokens} rows, cuBLAS",
            [partial(torch.mm, x[2048][:tokens], head.t(), out_dtype=torch.float32, out=out)],
            2.0 * head.numel(),
        )


def elementwise(bench: Bench, ops: KernelOps) -> None:
    """The small kernels, at a decode batch of 256 and a chunk of 8,192."""
    for tokens in (256, 8192):
        hidden, x, normed, weight = (random(size, 2048) for size in (tokens, tokens, tokens, 1))
        bench.add(
            f"rms_norm_add, {tokens}", [partial(ops.rms_norm_add, x, hidden, None, weight, normed, tokens, 1e-5)] * 8,
            8.0 * tokens * 2048,
        )  # fmt: skip
        wide, act = random(tokens, 16384), random(tokens, 8192)
        bench.add(
            f"silu_mul, {tokens}",
            [partial(ops.silu_mul, wide, None, act, tokens)] * 8,
            6.0 * tokens * 8192,
        )
        qkv, cache = random(tokens, 3072), random(2, 600, 8, 16, 64)
        cos = torch.rand(tokens, 64, device="cuda")
        place = torch.arange(tokens, dtype=torch.int32, device="cuda")
        bench.add(
            f"qkv_epilogue, {tokens}",
            [partial(ops.qkv_epilogue, qkv, None, (None, None), cos, cos, place, place, cache, tokens, 1e-5)] * 8,
            4.0 * tokens * 3072,
        )  # fmt: skip


def sampling(bench: Bench, ops: KernelOps) -> None:
    """A batch of 1 and of 256 over the whole vocabulary."""
    device = torch.device("cuda")
    rows = DeviceRows(ops, 256, 64, 16, VOCAB, device)
    sampler = CudaSampler(ops, rows, 256, VOCAB, device)
    sampler.logits.normal_(0, 3)
    none, order = np.zeros(0, np.int32), torch.arange(256, dtype=torch.int32, device=device)
    kinds = {
        "greedy": SamplingParams(temperature=0),
        "temperature": SamplingParams(temperature=0.8),
        "top_k 50": SamplingParams(temperature=0.8, top_k=50),
        "top_p 0.9": SamplingParams(temperature=0.8, top_p=0.9),
        "penalties": SamplingParams(temperature=0, repetition_penalty=1.1),
    }
    # As a model's: a handful of tokens hold the mass.
    peaked = {"top_p 0.9, peaked": SamplingParams(temperature=0.8, top_p=0.9)}
    for name, params in (kinds | peaked).items():
        if name in peaked:
            sampler.logits[:, ::4000] += 12
        new = tuple(NewRow(i, np.arange(2, dtype=np.int32), 2, 2, np.zeros(1, np.int32), i, params) for i in range(256))
        rows.apply(Step(0, none, new, none, none, none, none, none, none, none, none))
        for count in (1, 256):
            flags = int(rows.flags[0])
            body = partial(sampler.sample, order, count, bool(flags & 1), bool(flags & 2))
            bench.add(f"sample {name}, {count} rows", [body] * 4, 4.0 * count * VOCAB)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--groups", default="products,small,sampling,attention,prefix")
    arguments = parser.parse_args()
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        bench = Bench()
        print(
            f"copy {bench.bandwidth / 1e12:.2f} TB/s, bfloat16 product {bench.operations / 1e12:.0f} TFLOP/s",
            flush=True,
        )
        ops = make_ops(LLAMA_1B)
        groups = arguments.groups.split(",")
        if "products" in groups:
            products(bench, ops)
        if "small" in groups:
            elementwise(bench, ops)
        if "sampling" in groups:
            sampling(bench, ops)
        if "attention" in groups:
            attention(bench, LLAMA_1B, "1b")
            attention(bench, LLAMA_8B, "8b")
        if "prefix" in groups:
            for rows, prefix in ((128, 2048), (256, 2048), (64, 512), (128, 8192)):
                behind_prefix(bench, LLAMA_1B, "1b", rows, prefix, 64)
                behind_prefix(bench, LLAMA_8B, "8b", rows, prefix, 64)
    report = {
        "command": f"python -m bench.gpu_kernels --groups {arguments.groups} --out FILE",
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "copy_TB_per_s": bench.bandwidth / 1e12,
        "bfloat16_TFLOP_per_s": bench.operations / 1e12,
        "kernels": bench.rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
