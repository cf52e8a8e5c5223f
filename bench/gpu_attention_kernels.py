"""The attention kernels for bench.gpu_kernels: decode, prefill, and decode behind a prefix that rows share."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from bench.gpu_kernel_times import Bench, ints, make_ops, random
from kernels.operands import DecodeItems, DecodeScratch, SharedPrefixes, StepTensors
from kernels.shapes import KernelShape, most_decode_items
from worker.backends.cuda_model import prefill_tiles
from worker.backends.shared_prefix import MOST_PARTS, prefix_work, shared_prefixes

DECODE_CASES = ((1, 640), (1, 8192), (32, 4096), (256, 384), (256, 1024))  # rows and their context


def attention(bench: Bench, shape: KernelShape, name: str) -> None:
    """Decode over several batch shapes, prefill of 8,192 tokens."""
    ops = make_ops(shape)
    cases = {f"{rows} rows of {context}": [context] * rows for rows, context in DECODE_CASES}
    cases["256 rows of 100 to 1500"] = np.random.default_rng(1).integers(100, 1501, 256).tolist()
    for text, contexts in cases.items():
        rows, blocks = len(contexts), -(-max(contexts) // 16)
        copies = 4 if sum(contexts) < 50_000 else 1
        caches = [random(2, rows * blocks, shape.num_kv_heads, 16, shape.head_dim) for _ in range(copies)]
        table = torch.randperm(rows * blocks, device="cuda").to(torch.int32).view(rows, blocks)
        step = StepTensors(ints(range(rows)), ints([1] * rows), ints(range(rows)), ints(contexts), table)
        most = most_decode_items(shape, rows, max(contexts))
        work = DecodeItems(ints([[0] * 8] * most), ints([0]), 0)
        partials = torch.empty((most, shape.num_heads * (shape.head_dim + 2)), dtype=torch.float32, device="cuda")
        scratch = DecodeScratch(partials, ints([0] * rows * shape.num_heads))
        qkv, out = random(rows, shape.qkv_size), random(rows, shape.q_size)
        ops.plan_decode(step, rows, work, tokens=rows)
        bodies = [partial(ops.decode_attention, qkv, cache, step, work, scratch, out, rows) for cache in caches] * (
            8 // copies
        )
        size = 4.0 * sum(contexts) * shape.num_kv_heads * shape.head_dim
        bench.add(f"{name} decode attention, {text}", bodies, size)
    tokens = 8192
    cache = random(2, tokens // 16, shape.num_kv_heads, 16, shape.head_dim)
    table = torch.randperm(tokens // 16, device="cuda").to(torch.int32)[None]
    step = StepTensors(ints([0]), ints([tokens]), ints([0]), ints([tokens]), table)
    tiles = prefill_tiles(
        step.num_scheduled.cpu().numpy(),
        step.context_lens.cpu().numpy(),
        shape.num_heads // shape.num_kv_heads,
        ops.prefill_tile_rows,
    )
    on_device = torch.from_numpy(tiles).cuda()
    qkv, out = random(tokens, shape.qkv_size), random(tokens, shape.q_size)
    operations = 2.0 * tokens * tokens * shape.head_dim * shape.num_heads
    bench.add(
        f"{name} prefill attention, {tokens}",
        [lambda: ops.prefill_attention(qkv, cache, step, on_device, 0, out)],
        0,
        operations,
    )
    q = random(1, shape.num_heads, tokens, shape.head_dim)
    bench.add(
        f"{name} torch SDPA, {tokens}", [lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)], 0, operations
    )


def behind_prefix(bench: Bench, shape: KernelShape, name: str, rows: int, prefix: int, own: int) -> None:
    """Decode attention of rows that share a prefix: each by itself, and with the prefix read once for all."""
    ops = make_ops(shape)
    if not ops.shares_prefixes:
        return
    shared, each = prefix // 16, -(-own // 16)
    order = torch.randperm(shared + rows * each).to(torch.int32)
    table = torch.cat((order[:shared].expand(rows, shared), order[shared:].view(rows, each)), dim=1).contiguous()
    places = np.arange(rows, dtype=np.int32)
    groups = shared_prefixes(table.numpy(), places, np.full(rows, prefix + own - 1), 16)
    most = most_decode_items(shape, rows, prefix + own)
    group = shape.num_heads // shape.num_kv_heads
    tile_rows = ops.prefill_tile_rows
    work = prefix_work(groups, places, places, np.arange(rows), group, shape.num_kv_heads, tile_rows, most)
    lists = SharedPrefixes(ints(work.prefixes), ints(work.query_tokens), ints(work.works), ints([len(work.works)]))
    # As many layers as keep each one's keys and values from staying in the cache.
    caches = [random(2, shared + rows * each, shape.num_kv_heads, 16, shape.head_dim) for _ in range(4)]
    step = StepTensors(ints(places), ints([1] * rows), ints(places), ints([prefix + own] * rows), table.cuda())
    columns = shape.num_heads * (shape.head_dim + 2)
    partials = torch.empty((most + rows * MOST_PARTS, columns), dtype=torch.float32, device="cuda")
    scratch = DecodeScratch(partials, ints([0] * rows * shape.num_heads))
    work_lists = [DecodeItems(ints([[0] * 8] * most), ints([0]), 0) for _ in range(2)]
    ops.plan_decode(step, rows, work_lists[0], tokens=rows)
    ops.plan_decode(step, rows, work_lists[1], tokens=rows, shared=lists)
    qkv, out = random(rows, shape.qkv_size), random(rows, shape.q_size)

    def alone(cache: torch.Tensor) -> None:
        ops.decode_attention(qkv, cache, step, work_lists[0], scratch, out, rows)

    def together(cache: torch.Tensor) -> None:
        ops.prefix_attention(qkv, cache, step, lists, scratch)
        ops.decode_attention(qkv, cache, step, work_lists[1], scratch, out, rows, after_prefix=True)

    def prefix_only(cache: torch.Tensor) -> None:
        ops.prefix_attention(qkv, cache, step, lists, scratch)

    text = f"{name} decode attention, {rows} rows of {prefix} + {own}"
    operations = 4.0 * rows * prefix * shape.num_heads * shape.head_dim
    bench.add(f"{text}, each its prefix", [partial(alone, cache) for cache in caches] * 2)
    bench.add(f"{text}, the prefix together", [partial(together, cache) for cache in caches] * 2)
    bench.add(f"{text}, the prefix's part of it", [partial(prefix_only, cache) for cache in caches] * 2, 0, operations)
