"""Kernels with a defect sown into them: the checks of the other files must find it, within a few orders of threads and warps."""

from __future__ import annotations

from unittest.mock import patch

import pytest

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from tests.emulator.compile import Builder, Mutation
from tests.emulator.sown import Make, must_find
from tests.gpu.gpu_harness import PagedRows, make_shape
from tests.gpu.sampling_rows import PARAMS, Sampling, make_rows
from tests.gpu.test_gpu_attention import check_decode, check_decode_of_many, check_plan_decode, check_prefill
from tests.gpu.test_gpu_layers import check_embedding_norms_and_silu, check_matvec, check_qkv_epilogue
from tests.gpu.test_gpu_sampling import check_nan_and_infinity, check_penalties, check_prepare, check_sampling
from tests.gpu.test_gpu_shared_prefix import Decode, SharedRows, check_shared
from tests.gpu.test_gpu_truncation import check_edges, check_masses, check_places, check_truncation


def decode(make: Make) -> None:
    shape = make_shape(8, 2, 64)
    for lengths in (
        [300, 1, 17, 513, 40, 770, 31, 600, 77],
        [40, 17, 130, 31, 77, 90],
    ):  # the second: every item is a row's last
        paged = PagedRows(lengths, 2, 64, device="cpu")
        check_decode(make(shape, multiprocessors=2), shape, paged, 0, [])


def decode_of_many_splits(make: Make) -> None:
    shape = make_shape(8, 2, 64)
    check_decode(make(shape), shape, PagedRows([256 * 18, 128 * 5, 77], 2, 64, device="cpu"), 0, [])


def decode_in_two_layers(make: Make) -> None:
    with patch("kernels.shapes.DECODE_LAYERED_ROWS", 9):
        paged = PagedRows([1 + 379 * i % 600 for i in range(12)], 2, 64, device="cpu")
        shape = make_shape(8, 2, 64)
        check_decode_of_many(make(shape, multiprocessors=4), shape, paged, 0, [2, 0])


def decode_behind_a_window(make: Make) -> None:
    shape = make_shape(8, 2, 64)
    check_decode(make(shape), shape, PagedRows([300, 129, 401], 2, 64, window=150, device="cpu"), 150, [])


def plan(make: Make) -> None:
    shape = make_shape()
    for tokens in (16, 17):
        check_plan_decode(make(shape), shape, 9, tokens, 0, "cpu")


def decode_behind_prefix(make: Make) -> None:
    shape, prefixes, members = make_shape(4, 2, 64), [640], [(0, 1 + i) for i in range(32)] + [(0, 300)]
    check_shared(Decode(make(shape), shape, SharedRows(prefixes, members, 2, 64, "cpu")), prefixes, members)


def prefill(make: Make) -> None:
    shape = make_shape(4, 2, 64)
    check_prefill(make(shape), shape, PagedRows([65, 150], 2, 64, device="cpu"), 0, [])


def norms(make: Make) -> None:
    check_embedding_norms_and_silu(make(make_shape(hidden=576, wide=3 * 576)), 576, "cpu")


def epilogue(make: Make) -> None:
    shape = make_shape(7, 1, 64)
    check_qkv_epilogue(make(shape), shape, "cpu")


def matvec(make: Make) -> None:
    check_matvec(make(make_shape(hidden=512, wide=512), multiprocessors=1), 96, 512, "cpu")


def prepare(make: Make) -> None:
    check_prepare(make_rows(1000, 8, make(make_shape()), "cpu"), "cpu")


def penalties(make: Make) -> None:
    check_penalties(make_rows(100, 2, make(make_shape()), "cpu"), "cpu")


def sampling(make: Make) -> None:
    check_sampling(make_rows(5003, len(PARAMS) + 2, make(make_shape()), "cpu"), 5003, 4, "cpu")


def not_finite(make: Make) -> None:
    check_nan_and_infinity(make_rows(5000, 12, make(make_shape()), "cpu"), "cpu")


def truncation(make: Make) -> None:
    def rows_for(vocab: int, rows: int) -> Sampling:
        return make_rows(vocab, rows, make(make_shape()), "cpu")

    check_edges(rows_for, 6001, (2, 5, 11, 20), "cpu")
    check_truncation(rows_for, "flat", 6001, 1, "cpu", large=3000)


def truncation_by_clusters(make: Make) -> None:
    def rows_for(vocab: int, rows: int) -> Sampling:
        return make_rows(vocab, rows, make(make_shape(), clusters=True), "cpu")

    check_places(rows_for(1003, 4), 1003, [0, 127, 128, 1002], "cpu")
    check_edges(rows_for, 6001, (2, 5), "cpu")
    check_truncation(rows_for, "flat", 6001, 1, "cpu", large=3000)


def masses(make: Make) -> None:
    check_masses(lambda vocab, rows: make_rows(vocab, rows, make(make_shape()), "cpu"), 6001, "cpu")


def longer_than_the_list(make: Make) -> None:
    def rows_for(vocab: int, rows: int) -> Sampling:
        return make_rows(vocab, rows, make(make_shape()), "cpu")

    check_truncation(rows_for, "flat", 6001, 6, "cpu", large=5000)
    check_truncation(rows_for, "equal", 20_011, 1, "cpu", large=15_000)


def lists_that_overflow(make: Make) -> None:
    def rows_for(vocab: int, rows: int) -> Sampling:
        return make_rows(vocab, rows, make(make_shape(), clusters=True), "cpu")

    check_truncation(rows_for, "outlier", 6001, 3, "cpu", large=5000)


def wide_rows(make: Make) -> None:
    check_places(make_rows(40_003, 2, make(make_shape(), clusters=True), "cpu"), 40_003, [4999, 40_002], "cpu")


DECODE, ITEMS, MERGE = "decode_attention.cu", "decode_items.cuh", "decode_merge.cuh"
PREFILL, MATVEC = "prefill_attention.cu", "matvec.cuh"
ROWS, TRUNCATED, THRESHOLD, HISTOGRAM = "row_state.cu", "truncated_sample.cu", "threshold.cuh", "histogram.cuh"
MUTANTS = {
    "copies of other lanes are read at once": (decode, Mutation(DECODE, "__syncwarp();  // of all lanes", "")),
    "a copy is not waited for": (decode, Mutation(DECODE, "copies_done<DEPTH - 1>();", "copies_done<DEPTH>();")),
    "an operand of another lane": (decode, Mutation(DECODE, "(h * 8 + g, c * 4 + t)", "(h * 8 + g, c * 4 + (t ^ 1))")),
    "neighbouring tokens exchanged": (
        decode,
        Mutation(DECODE, "word(0), word(1), 0x7632", "word(1), word(0), 0x7632"),
    ),
    "sums shrink by another head's maximum": (decode, Mutation(DECODE, "shrink, 8 * t + 4)", "shrink, 8 * t)")),
    "the counter of arrivals stays": (decode, Mutation(MERGE, "splits - 1);  // 0 again", "splits);  //")),
    "a block arrives before its results": (
        decode,
        Mutation(MERGE, "    __syncwarp();  // all lanes have stored\n", ""),
    ),
    "the last one to arrive is another": (
        decode,
        Mutation(MERGE, "< splits - 1) return", "< splits) return"),
    ),
    "items lie in units of another size": (
        decode,
        Mutation(ITEMS, "return begin / STEP * STEP +", "return begin / (2 * STEP) * (2 * STEP) +"),
    ),
    "an item begins a step too late": (
        decode_behind_a_window,
        Mutation(ITEMS, "(begin % STEP / 16 + SLOTS - 1 - slot)", "(begin % STEP / 16 + SLOTS - slot)"),
    ),
    "an item begins where its split does": (
        decode_behind_a_window,
        Mutation(ROWS, "return max(begin, (", "return max(0, ("),
    ),
    "an item ends a step too early": (
        decode,
        Mutation(ITEMS, "/ 16 + SLOTS - slot) / SLOTS", "/ 16 - slot) / SLOTS"),
    ),
    "the table of sizes is too short": (
        plan,
        Mutation(ROWS, "SIZES = LARGEST_SPLIT / 16;", "SIZES = LARGEST_SPLIT / 32;"),
    ),
    "a row's last item is left out": (plan, Mutation(ROWS, "- row.skipped + 1;", "- row.skipped;")),
    "a row of as many items as may be is a long one": (plan, Mutation(ROWS, "> most ?", ">= most ?")),
    "a long row's items are as short as any": (
        plan,
        Mutation(ROWS, "most ? long_split : split", "most ? split : split"),
    ),
    "a later trip fetches the same parts": (
        decode_of_many_splits,
        Mutation(MERGE, ", parts += MERGE_AHEAD * stride)", ")"),
    ),
    "four parts are not fetched": (
        decode_of_many_splits,
        Mutation(
            MERGE,
            "first + four >= count) continue;\n#pragma unroll\n        for (int i = four; i < four + 4; i++) {\n          const",
            "first + four + 4 >= count) continue;\n#pragma unroll\n        for (int i = four; i < four + 4; i++) {\n          const",
        ),
    ),
    "the last part is added again": (decode, Mutation(MERGE, "if (first + i < count) *this = with;", "*this = with;")),
    "a lane fetches another part's sum": (
        decode_of_many_splits,
        Mutation(MERGE, "min(lane % MERGE_AHEAD,", "min(lane % 8,"),
    ),
    "the shortest items are nobody's": (
        decode_in_two_layers,
        Mutation(ITEMS, "count - apart + min(column + 1, apart)", "count - apart"),
    ),
    "the shortest items are done twice": (
        decode_in_two_layers,
        Mutation(ITEMS, "Deal{column, count - apart}", "Deal{column, count}"),
    ),
    "a later block takes another's item": (
        decode_in_two_layers,
        Mutation(ITEMS, "Deal{count - apart + column, ", "Deal{count - apart, "),
    ),
    "results are overwritten while they are read": (decode, Mutation(DECODE, "barrier_wait(&merged, parity);", "")),
    "slots are merged before they are there": (decode, Mutation(DECODE, "barrier_wait(&stored, parity);", "")),
    "the phases of the barriers are exchanged": (
        decode,
        Mutation(DECODE, "stride = other_stride(stride), parity ^= 1", "stride = other_stride(stride)"),
    ),
    "the item before is another": (
        decode,
        Mutation(DECODE, "before = item, item = next", "item = next, before = item"),
    ),
    "this step's token is fetched too early": (
        decode,
        Mutation(DECODE, "if (EARLY && first + token == newest) continue;", ""),
    ),
    "the query is read before it is written": (
        decode,
        Mutation(DECODE, "  wait_for_previous();\n  if (newest_stage", "  if (newest_stage"),
    ),
    "a part of the prefix is left out": (
        decode_behind_prefix,
        Mutation(MERGE, "item.prefix % 32, STRIDE", "item.prefix % 32 - 1, STRIDE"),
    ),
    "the next keys come too early": (
        prefill,
        Mutation(PREFILL, "__syncthreads();  // before the next copies overwrite this stage", ""),
    ),
    "the values are not there yet": (prefill, Mutation(PREFILL, "copies_done<2>();", "copies_done<3>();")),
    "two of four matrices exchanged": (
        prefill,
        Mutation(PREFILL, "matrix / 2 * 8 + row, k * 2 + matrix % 2", "matrix % 2 * 8 + row, k * 2 + matrix / 2"),
    ),
    "a token does not see itself": (prefill, Mutation(PREFILL, "if (key > position ||", "if (key >= position ||")),
    "sums are read before they are there": (norms, Mutation("norm.cuh", "  __syncthreads();\n", "")),
    "a store beyond the end": (
        norms,
        Mutation("silu_mul.cu", "if (at >= (long long)tokens * VECTORS) return;", ""),
    ),
    "the partner is half as far away": (
        epilogue,
        Mutation("qkv_epilogue.cu", "__shfl_xor_sync(~0u, x[j], LANES / 2)", "__shfl_xor_sync(~0u, x[j], LANES / 4)"),
    ),
    "one buffer for two tiles": (matvec, Mutation(MATVEC, "tile = next, buffer ^= 1", "tile = next")),
    "weights are not there yet": (matvec, Mutation(MATVEC, "copies_done<AHEAD - 1>();", "copies_done<AHEAD>();")),
    "accumulators exchanged": (matvec, Mutation(MATVEC, "t][g + 8] = c[j][2];", "t][g + 8] = c[j][1];")),
    "the count changes while it is read": (prepare, Mutation(ROWS, "__syncthreads();  // everyone has read it", "")),
    "padding is not marked": (
        prepare,
        Mutation(ROWS, "q_start[r + 1] : num_tokens", "q_start[r + 1] : num_tokens - 1"),
    ),
    "what is sampled is not counted": (
        penalties,
        Mutation("sample.cu", "vocab + token] += 1;", "vocab + token] += 0;"),
    ),
    "tokens are counted before the last row's are forgotten": (
        sampling,
        Mutation(ROWS, "mine[i] = 0;\n    __syncthreads();", "mine[i] = 0;"),
    ),
    "a bias is added before its logit is there": (
        sampling,
        Mutation("process_logits.cu", "raw_state + s, state);\n  __syncthreads();", "raw_state + s, state);"),
    ),
    "the best of other warps is not there yet": (
        sampling,
        Mutation("sample.cu", "  __syncthreads();\n  if (threadIdx.x != 0)", "  if (threadIdx.x != 0)"),
    ),
    "a row's arrivals stay": (penalties, Mutation("sample.cu", "  arrived[s] = 0;\n", "")),
    "a row's state stays": (
        not_finite,
        Mutation("sample.cu", "atomicExch(raw_state + s, 0)", "raw_state[s]"),
    ),
    "bins are summed before they are full": (
        truncation,
        Mutation(
            HISTOGRAM,
            "__syncthreads();\n  for (int i = threadIdx.x; i < BINS / 4",
            "for (int i = threadIdx.x; i < BINS / 4",
        ),
    ),
    "the bin before is forgotten": (
        truncation,
        Mutation(HISTOGRAM, "h.bin = bin, h.above = start,", "h.bin = bin, h.above = 0,"),
    ),
    "lists are read before they are there": (
        truncation,
        Mutation(THRESHOLD, "  meet(alone);\n", ""),
    ),
    "tokens are passed over that lie in the bin": (
        truncation,
        Mutation(THRESHOLD, "edge = bin_of(edge) > bin ?", "edge = 2 * (half_top - bin / scale); edge = true ?"),
    ),
    "blocks that share no memory": (
        truncation_by_clusters,
        Mutation("cluster.cuh", "__cluster_dims__(CLUSTER, 1, 1)", ""),
    ),
    "another block may not have begun": (
        truncation_by_clusters,
        Mutation(TRUNCATED, "  meet_cluster();\n  u32 other", "  __syncthreads();\n  u32 other"),
    ),
    "tokens between two slices": (
        truncation_by_clusters,
        Mutation(TRUNCATED, "min(each, vocab - first)", "min(each - 4, vocab - first)"),
    ),
    "a slice is looked at before it is there": (
        wide_rows,
        Mutation("slice.cuh", "copies_done<1>();", "copies_done<2>();"),
    ),
    "a block's part of the histogram is left out": (
        truncation_by_clusters,
        Mutation(HISTOGRAM, "if (r < ranks) own += of_block(h.groups", "if (r < ranks - 1) own += of_block(h.groups"),
    ),
    "other blocks' bins are not full": (
        truncation_by_clusters,
        Mutation(HISTOGRAM, "  meet(alone);\n", "  __syncthreads();\n"),
    ),
    "other blocks' lists are not there": (
        truncation_by_clusters,
        Mutation(THRESHOLD, "  meet(alone);\n", "  __syncthreads();\n"),
    ),
    "a histogram is cleared while others read it": (
        lists_that_overflow,
        Mutation(THRESHOLD, "    meet(listed >= 0);", "    __syncthreads();"),
    ),
    "lists lie on one another": (
        truncation_by_clusters,
        Mutation(THRESHOLD, "all_lists() + first;", "all_lists() + rank;"),
    ),
    "a warp's part of the sum is left out": (
        masses,
        Mutation(THRESHOLD, "== 0 && weighs) add", "== 0 && weighs && threadIdx.x) add"),
    ),
    "a sum is read before it is whole": (
        masses,
        Mutation(THRESHOLD, "  __syncthreads();\n  if (threadIdx.x == 0) s.sum", "  if (threadIdx.x == 0) s.sum"),
    ),
    "what is large is not added up": (masses, Mutation(THRESHOLD, "((u64)high << 23)", "((u64)high << 22)")),
    "the threshold is not in the list": (longer_than_the_list, Mutation(TRUNCATED, "s.above >= target", "true")),
    "the list is not long enough": (longer_than_the_list, Mutation(TRUNCATED, "s.num_listed >= f.top_k", "true")),
    "a list that is not whole": (longer_than_the_list, Mutation(TRUNCATED, "s.num_listed <= LISTED &&", "")),
    "a block leaves before its list is taken": (
        truncation_by_clusters,
        Mutation(THRESHOLD, "  meet_cluster();\n  return all;", "  return all;"),
    ),
    "a block leaves before its best is taken": (
        truncation_by_clusters,
        Mutation(TRUNCATED, "take(s, best);\n      meet_cluster();", "take(s, best);"),
    ),
    "the best of other blocks is left out": (
        truncation_by_clusters,
        Mutation(THRESHOLD, "if (threadIdx.x < CLUSTER * WARPS)", "if (threadIdx.x < WARPS)"),
    ),
}


@pytest.mark.parametrize("defect", MUTANTS)
def test_a_defect_is_found(builder: Builder, defect: str) -> None:
    must_find(builder, *MUTANTS[defect])
