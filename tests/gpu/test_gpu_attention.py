"""Decode and prefill attention over a poisoned paged cache, against float32, and bit for bit against themselves in other batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.operands import DecodeItems, DecodeScratch, StepTensors
from kernels.ops import KernelOps
from kernels.shapes import KernelShape
from tests.gpu.gpu_harness import PagedRows, error, ints, make_ops, make_shape, on, poisoned, random
from worker.backends.cuda_model import prefill_tiles

pytestmark = pytest.mark.gpu

HEADS = [(8, 8, 64), (8, 2, 64), (9, 3, 64), (14, 2, 64), (32, 1, 64), (8, 2, 128), (16, 1, 128)]


def decode(
    ops: KernelOps, shape: KernelShape, paged: PagedRows, qkv: torch.Tensor, picked: list[int], window: int
) -> torch.Tensor:
    """Attention of the last position of the picked rows, out [picked, heads, head_dim]."""
    lengths, device = [paged.lengths[i] for i in picked], paged.device
    once, starts = ints([1] * len(picked), device), ints(list(range(len(picked))), device)
    step = StepTensors(paged.rows[picked], once, starts, ints(lengths, device), paged.block_table)
    most = sum(length // shape.split + 2 for length in lengths)
    work = DecodeItems(ints([[0] * 8] * most, device), ints([0], device), window)
    partials = poisoned(most, shape.num_heads * (shape.head_dim + 2), dtype=torch.float32, device=device)
    arrived = ints([0] * len(picked) * shape.num_heads, device)
    out = poisoned(len(picked), shape.q_size, device=device)
    ops.plan_decode(step, len(picked), work)
    ops.decode_attention(
        qkv[picked].clone(), paged.cache, step, work, DecodeScratch(partials, arrived), out, len(picked)
    )
    assert not arrived.any()
    return out.view(-1, shape.num_heads, shape.head_dim)


def check_decode(ops: KernelOps, shape: KernelShape, paged: PagedRows, window: int, fewer: list[list[int]]) -> None:
    """Every row's last position against float32, and the same bits for the picked rows of each of `fewer` alone."""
    count = len(paged.lengths)
    qkv = random(count, shape.qkv_size, seed=9, device=paged.device)
    out = decode(ops, shape, paged, qkv, list(range(count)), window)
    for i, length in enumerate(paged.lengths):
        query = qkv[i : i + 1, : shape.q_size].view(1, shape.num_heads, shape.head_dim)
        assert error(out[i : i + 1], paged.attention(i, query, length - 1, window)) < 1e-2, length
    for picked in fewer:
        assert torch.equal(decode(ops, shape, paged, qkv, picked, window), out[picked])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [0, 100])
def test_decode(heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    shape = make_shape(heads, kv_heads, head_dim)
    paged = PagedRows([1, 15, 16, 17, 255, 256, 257, 300, 1000, 2049, 63], kv_heads, head_dim, window=window)
    check_decode(make_ops(shape), shape, paged, window, [[8], [9, 3, 5], [10, 9, 8, 7]])


def prefill(
    ops: KernelOps,
    shape: KernelShape,
    paged: PagedRows,
    qkv: list[torch.Tensor],
    spans: list[tuple[int, int, int]],
    window: int,
) -> list[torch.Tensor]:
    """Attention of spans (row, first, end), each out [tokens, heads, head_dim]."""
    counts, device = [end - first for _, first, end in spans], paged.device
    starts = [sum(counts[:i]) for i in range(len(spans))]
    ends = ints([end for _, _, end in spans], device)
    rows = paged.rows[[row for row, _, _ in spans]]
    step = StepTensors(rows, ints(counts, device), ints(starts, device), ends, paged.block_table)
    group = shape.num_heads // shape.num_kv_heads
    tiles = prefill_tiles(step.num_scheduled.cpu().numpy(), ends.cpu().numpy(), group, ops.prefill_tile_rows)
    tiles = np.concatenate((tiles, [[-1, 0], [-1, 77]])).astype(np.int32)  # padding of a graph
    out = poisoned(sum(counts) + 1, shape.q_size, device=device)
    queries = torch.cat([qkv[row][first:end] for row, first, end in spans])
    ops.prefill_attention(queries, paged.cache, step, on(device, torch.from_numpy(tiles)), window, out)
    assert torch.isnan(out[-1]).all()
    return [out[s : s + c].view(c, shape.num_heads, shape.head_dim) for s, c in zip(starts, counts, strict=True)]


def check_prefill(
    ops: KernelOps, shape: KernelShape, paged: PagedRows, window: int, cuts: list[list[tuple[int, int, int]]]
) -> None:
    """Every row from its start against float32, and the same bits for the spans (row, first, end) of each of `cuts`."""
    lengths, device = paged.lengths, paged.device
    qkv = [random(length, shape.qkv_size, seed=50 + i, device=device) for i, length in enumerate(lengths)]
    whole = prefill(ops, shape, paged, qkv, [(i, 0, length) for i, length in enumerate(lengths)], window)
    for i, length in enumerate(lengths):
        query = qkv[i][:, : shape.q_size].view(length, shape.num_heads, shape.head_dim)
        assert error(whole[i], paged.attention(i, query, 0, window)) < 1e-2, length
    for spans in cuts:
        for (row, first, end), part in zip(spans, prefill(ops, shape, paged, qkv, spans, window), strict=True):
            assert torch.equal(part, whole[row][first:end]), "a token's bits depend on how its prompt was cut"


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [0, 100])
def test_prefill(heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    shape = make_shape(heads, kv_heads, head_dim)
    paged = PagedRows([2, 64, 65, 130, 517, 1100], kv_heads, head_dim)
    cuts = [[(4, 0, 100), (5, 0, 333)], [(5, 333, 1100), (4, 100, 517)], [(3, 63, 130), (5, 1000, 1100)]]
    check_prefill(make_ops(shape), shape, paged, window, cuts)


def check_prefill_behind_a_window(ops: KernelOps, shape: KernelShape, device: str) -> None:
    paged = PagedRows([700], 2, 64, window=100 + 49, device=device)  # slots before 700 - 149 are NaN
    qkv = [random(700, shape.qkv_size, seed=3, device=device)]
    out = prefill(ops, shape, paged, qkv, [(0, 650, 700)], 100)[0]
    query = qkv[0][650:, : shape.q_size].view(50, 8, 64)
    assert error(out, paged.attention(0, query, 650, 100)) < 1e-2


def test_prefill_reads_nothing_behind_the_window() -> None:
    shape = make_shape(8, 2, 64)
    check_prefill_behind_a_window(make_ops(shape), shape, "cuda")
