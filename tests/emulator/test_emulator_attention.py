"""Decode and prefill attention without a GPU: the checks of tests/gpu on few rows, in whatever order threads, warps and blocks run."""

from __future__ import annotations

import pytest

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from tests.emulator.compile import Builder
from tests.emulator.library import EmulatedOps
from tests.gpu.gpu_harness import PagedRows, make_shape
from tests.gpu.test_gpu_attention import (
    BORDER_STEPS,
    MANY_SPLITS,
    PLANS,
    SPLITS,
    borders,
    check_decode,
    check_decode_of_many,
    check_plan_decode,
    check_prefill,
    check_prefill_behind_a_window,
)
from tests.gpu.test_gpu_shared_prefix import Decode, SharedRows, check_shared

GROUPS = [
    (2, 2, 64),
    (8, 2, 64),
    (16, 2, 64),
    (16, 1, 64),
    (2, 2, 128),
    (4, 1, 128),
    (8, 1, 128),
    (16, 1, 128),
    (32, 1, 64),
]
DECODE = ("row_state", "decode_attention", "decode_attention-few")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"),
    [*((*group, 0) for group in GROUPS), *((*group, 100) for group in GROUPS[1::2])],
)
def test_decode(builder: Builder, heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    shape = make_shape(heads, kv_heads, head_dim)
    ops = EmulatedOps(builder, shape, DECODE, seed=window)
    paged = PagedRows(
        [1, 15, 16, 17, 255, 256, 257, 300, 620, 1030, 63], kv_heads, head_dim, window=window, device="cpu"
    )
    check_decode(ops, shape, paged, window, [[8], [9, 3, 5], [10, 9, 8, 7]])


@pytest.mark.parametrize("multiprocessors", [1, 2, 20])
def test_decode_on_few_and_many_multiprocessors(builder: Builder, multiprocessors: int) -> None:
    shape = make_shape(8, 2, 64)
    ops = EmulatedOps(builder, shape, DECODE, multiprocessors=multiprocessors)
    paged = PagedRows([300, 1, 17, 513, 40, 256, 800, 31, 128, 600, 3, 77], 2, 64, device="cpu")
    check_decode(ops, shape, paged, 0, [[6, 3], [0, 9, 2, 5, 6, 7, 8, 11]])


@pytest.mark.parametrize("count", [3, 9, 12, 17, 30])
def test_decode_whose_shortest_items_wait(builder: Builder, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Fewer of them than blocks of the first layer, as many, and none."""
    monkeypatch.setattr("kernels.shapes.DECODE_LAYERED_ROWS", 9)
    shape = make_shape(8, 2, 64)
    ops = EmulatedOps(builder, shape, DECODE, multiprocessors=4, seed=count)
    paged = PagedRows([1 + 379 * i % 600 for i in range(count)], 2, 64, device="cpu")
    check_decode_of_many(ops, shape, paged, 0, [2, 0])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (4, 1, 128)])
@pytest.mark.parametrize("window", [0, 100, 600])
@pytest.mark.parametrize("splits", SPLITS)
def test_decode_at_the_borders_of_splits(
    builder: Builder, heads: int, kv_heads: int, head_dim: int, window: int, splits: tuple[int, int]
) -> None:
    few, many = splits
    shape = make_shape(heads, kv_heads, head_dim, split=many, few_split=few)
    paged = PagedRows(borders(few, many), kv_heads, head_dim, window=window, device="cpu")
    check_decode(EmulatedOps(builder, shape, DECODE, seed=window), shape, paged, window, BORDER_STEPS)


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize(("count", "tokens"), PLANS)
@pytest.mark.parametrize("splits", SPLITS)
def test_plan_decode_lists_the_items_of_single_tokens(
    builder: Builder, count: int, tokens: int, window: int, splits: tuple[int, int]
) -> None:
    shape = make_shape(few_split=splits[0], split=splits[1])
    check_plan_decode(EmulatedOps(builder, shape), shape, count, tokens, window, "cpu")


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (32, 1, 64), (8, 2, 128), (32, 1, 128)])
def test_decode_of_more_splits_than_are_fetched_at_once(
    builder: Builder, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Of few rows more at once than of many: in the same order."""
    shape = make_shape(heads, kv_heads, head_dim)
    paged = PagedRows(MANY_SPLITS, kv_heads, head_dim, device="cpu")
    check_decode(EmulatedOps(builder, shape, DECODE), shape, paged, 0, [[3], [2, 0, 1], [4, 5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 64), (8, 2, 64), (16, 1, 64), (32, 1, 64), (8, 2, 128)]
)
def test_decode_behind_a_shared_prefix(builder: Builder, heads: int, kv_heads: int, head_dim: int) -> None:
    shape = make_shape(heads, kv_heads, head_dim)
    ops = EmulatedOps(builder, shape, ("row_state", "decode_attention", "decode_attention-prefix"))
    prefixes, members = [640], [(0, 1 + i * 7 % 40) for i in range(32)] + [(0, 300), (0, 257), (-1, 530), (-1, 5)]
    check_shared(Decode(ops, shape, SharedRows(prefixes, members, kv_heads, head_dim, "cpu")), prefixes, members)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 64), (9, 3, 64), (14, 2, 64), (4, 1, 128), (16, 1, 128)]
)
@pytest.mark.parametrize("window", [0, 40])
def test_prefill(builder: Builder, heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    shape = make_shape(heads, kv_heads, head_dim)
    paged = PagedRows([2, 64, 65, 150], kv_heads, head_dim, device="cpu")
    cuts = [[(3, 0, 50), (2, 0, 33)], [(3, 50, 150), (2, 33, 65), (1, 60, 64)]]
    check_prefill(EmulatedOps(builder, shape), shape, paged, window, cuts)


def test_prefill_reads_nothing_behind_the_window(builder: Builder) -> None:
    shape = make_shape(8, 2, 64)
    check_prefill_behind_a_window(EmulatedOps(builder, shape), shape, "cpu")
