"""Decode and prefill attention over a poisoned paged cache, against float32, and bit for bit against themselves in other batches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from kernels.operands import DecodeItems, DecodeScratch, SharedPrefixes, StepTensors
from kernels.ops import KernelOps
from kernels.shapes import MATVEC_ROWS, KernelShape, most_decode_items
from tests.gpu.gpu_harness import PagedRows, error, ints, make_ops, make_shape, makers, on, poisoned, random
from worker.backends.cuda_model import prefill_tiles

pytestmark = pytest.mark.gpu

SPLITS = [(128, 256), (512, 1024), (1024, 512)]  # up to MATVEC_ROWS tokens, and beyond
PLANS = [(7, 16), (7, 17), (16, 16), (1500, 1500)]  # rows and tokens of a step
MANY_SPLITS = [128 * 16, 128 * 16 + 1, 256 * 20 + 5, 256 * 33 - 1, 900, 513, 1, 128, 129]
BORDER_STEPS = [[0], [4], [3, 5], [11, 9, 6, 1], [2, 4, 5, 7, 8, 9, 10, 11]]
HEADS = [(8, 8, 64), (8, 2, 64), (9, 3, 64), (14, 2, 64), (32, 1, 64), (8, 2, 128), (16, 1, 128)]


def borders(*splits: int) -> list[int]:
    """Lengths of rows just below, at and above a border of splits of these sizes, and of two of them."""
    return [length + more for split in splits for length in (split, 2 * split) for more in (-1, 0, 1)]


def decode(
    ops: KernelOps,
    shape: KernelShape,
    paged: PagedRows,
    qkv: torch.Tensor,
    picked: list[int],
    window: int,
    tokens: int,
) -> torch.Tensor:
    """Attention of the last position of the picked rows, as in a step of `tokens` tokens, out [picked, heads, head_dim]."""
    lengths, device = [paged.lengths[i] for i in picked], paged.device
    once, starts = ints([1] * len(picked), device), ints(list(range(len(picked))), device)
    step = StepTensors(paged.rows[picked], once, starts, ints(lengths, device), paged.block_table)
    most = sum(most_decode_items(shape, 1, length) for length in lengths)
    work = DecodeItems(ints([[0] * 8] * most, device), ints([0], device), window)
    partials = poisoned(most, shape.num_heads * (shape.head_dim + 2), dtype=torch.float32, device=device)
    arrived = ints([0] * len(picked) * shape.num_heads, device)
    out = poisoned(len(picked), shape.q_size, device=device)
    ops.plan_decode(step, len(picked), work, tokens=tokens)
    ops.decode_attention(
        qkv[picked].clone(), paged.cache, step, work, DecodeScratch(partials, arrived), out, len(picked)
    )
    assert not arrived.any()
    return out.view(-1, shape.num_heads, shape.head_dim)


def check_decode(ops: KernelOps, shape: KernelShape, paged: PagedRows, window: int, fewer: list[list[int]]) -> None:
    """Every row's last position against float32, and the same bits for the picked rows of each of `fewer` alone: in steps of at most
    MATVEC_ROWS tokens, which there are of as many as rows, and in larger ones."""
    count = len(paged.lengths)
    assert count <= MATVEC_ROWS
    qkv = random(count, shape.qkv_size, seed=9, device=paged.device)
    for others in (0, MATVEC_ROWS):
        out = decode(ops, shape, paged, qkv, list(range(count)), window, count + others)
        for i, length in enumerate(paged.lengths):
            query = qkv[i : i + 1, : shape.q_size].view(1, shape.num_heads, shape.head_dim)
            assert error(out[i : i + 1], paged.attention(i, query, length - 1, window)) < 1e-2, length
        for picked in fewer:
            assert torch.equal(decode(ops, shape, paged, qkv, picked, window, len(picked) + others), out[picked])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [0, 100])
def test_decode(heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    shape = make_shape(heads, kv_heads, head_dim)
    paged = PagedRows([1, 15, 16, 17, 255, 256, 257, 300, 1000, 2049, 63], kv_heads, head_dim, window=window)
    check_decode(make_ops(shape), shape, paged, window, [[8], [9, 3, 5], [10, 9, 8, 7]])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [0, 100, 600])
def test_decode_at_the_borders_of_splits(head_dim: int, window: int) -> None:
    shape = make_shape(8, 2, head_dim, split=1024, few_split=512)
    check_decode(
        make_ops(shape), shape, PagedRows(borders(512, 1024), 2, head_dim, window=window), window, BORDER_STEPS
    )


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_decode_of_more_splits_than_are_fetched_at_once(heads: int, kv_heads: int, head_dim: int) -> None:
    """Of few rows more at once than of many: in the same order."""
    shape = make_shape(heads, kv_heads, head_dim)
    check_decode(
        make_ops(shape), shape, PagedRows(MANY_SPLITS, kv_heads, head_dim), 0, [[3], [2, 0, 1], [4, 5, 6, 7, 8]]
    )


def check_decode_of_many(ops: KernelOps, shape: KernelShape, paged: PagedRows, window: int, fewer: list[int]) -> None:
    """As check_decode, of more rows than MATVEC_ROWS."""
    count = len(paged.lengths)
    qkv = random(count, shape.qkv_size, seed=9, device=paged.device)
    out = decode(ops, shape, paged, qkv, list(range(count)), window, count)
    for i, length in enumerate(paged.lengths):
        query = qkv[i : i + 1, : shape.q_size].view(1, shape.num_heads, shape.head_dim)
        assert error(out[i : i + 1], paged.attention(i, query, length - 1, window)) < 1e-2, length
    assert torch.equal(decode(ops, shape, paged, qkv, fewer, window, count), out[fewer])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("count", [40, 100, 300])
def test_decode_of_many_rows(head_dim: int, count: int) -> None:
    shape = make_shape(32, 8, head_dim)
    paged = PagedRows([1 + 379 * i % 1500 for i in range(count)], 8, head_dim)
    check_decode_of_many(make_ops(shape), shape, paged, 0, [5, 39, 17])


def check_plan_decode(ops: KernelOps, shape: KernelShape, count: int, tokens: int, window: int, device: str) -> None:
    """The items of `count` rows, some of whom have one token, in a step of `tokens` tokens."""
    generator = torch.Generator().manual_seed(count)
    _, ints, _ = makers(device)
    contexts = torch.randint(1, 1100, (count,), generator=generator).tolist()
    scheduled = torch.randint(0, 3, (count,), generator=generator).tolist()
    few = 16 * shape.few_split + (0 if window else 256)  # behind its prefix
    special = [shape.split - 1, shape.split, 2 * shape.split + 1, shape.few_split, few, few + 1]
    contexts[: len(special)], scheduled[: len(special)] = special, [1] * len(special)
    prefixes = [(256 if context > 700 and not window else 0, 32 * i + 2) for i, context in enumerate(contexts)]
    rows, starts = [3 * i + 1 for i in range(count)], [7 * i for i in range(count)]
    expected: list[list[int]] = []
    partials = 0
    for i, context in enumerate(contexts):
        if scheduled[i] != 1:
            continue
        begin = max(0, context - window) if window else prefixes[i][0]
        most = 16 * shape.few_split if tokens <= MATVEC_ROWS else 0
        size = shape.few_split if context - begin <= most else shape.split
        edges = [begin, *range((begin // size + 1) * size, context, size), context]
        splits = len(edges) - 1
        for k, (left, right) in enumerate(pairwise(edges)):
            which = k << 16 | splits
            expected.append([i, left, right, starts[i], partials, rows[i], which, 0 if window else prefixes[i][1]])
        partials += splits
    assert len(expected) <= sum(most_decode_items(shape, 1, context) for context in contexts)
    untouched = [[-1] * 8] * 64
    work = DecodeItems(ints([[-1] * 8] * len(expected) + untouched), ints([-1]), window)
    step = StepTensors(ints(rows), ints(scheduled), ints(starts), ints(contexts), ints([[0]]))
    shared = None if window else SharedPrefixes(ints(prefixes), ints([]), ints([]), ints([0]))
    ops.plan_decode(step, count, work, tokens=tokens, shared=shared)
    assert int(work.num_items) == len(expected)
    items = work.items.tolist()
    assert items[len(expected) :] == untouched
    items = items[: len(expected)]
    assert sorted(items) == expected
    sizes = [-(-(end - begin) // 16) for _, begin, end, *_ in items]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize(("count", "tokens"), PLANS)
@pytest.mark.parametrize("splits", SPLITS)
def test_plan_decode_lists_the_items_of_single_tokens(
    count: int, tokens: int, window: int, splits: tuple[int, int]
) -> None:
    shape = make_shape(few_split=splits[0], split=splits[1])
    check_plan_decode(make_ops(shape), shape, count, tokens, window, "cuda")


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
