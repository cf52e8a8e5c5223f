"""Decode attention of rows that read a shared prefix together, against float32 and against the same rows reading it alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.operands import DecodeItems, DecodeScratch, SharedPrefixes, StepTensors
from kernels.ops import KernelOps
from kernels.shapes import KernelShape, most_decode_items
from tests.gpu.gpu_harness import BLOCK, PagedRows, error, make_ops, make_shape, makers, on
from worker.backends.shared_prefix import MOST_PARTS, PrefixWork, most_works, prefix_work, shared_prefixes

pytestmark = pytest.mark.gpu

HEADS = [(8, 8, 64), (8, 2, 64), (9, 3, 64), (14, 2, 64), (32, 1, 64), (4, 4, 128), (8, 2, 128), (16, 2, 128)]
CASES = {  # prefixes; of each row which of them it has (-1: none) and how many tokens behind it
    "just enough": ([512], [(0, 1 + i % 40) for i in range(33)]),
    "own tokens in several splits": ([1024, 0], [(0, 1 + 37 * i % 700) for i in range(48)] + [(1, 530), (1, 1), (1, 257)]),
    "two prefixes and others": (
        [640, 1920],
        [(i % 2, 1 + i % 17) for i in range(90)] + [(-1, 1 + 61 * i) for i in range(20)],
    ),
    "many rows": ([1280], [(0, 1 + i % 64) for i in range(200)]),
    "long": ([4096], [(0, 1 + i % 300) for i in range(40)] + [(-1, 700)]),
    "very long": ([8320], [(0, 1 + i % 20) for i in range(34)]),
}  # fmt: skip


class SharedRows(PagedRows):
    """Rows that begin with the blocks of a prefix. A prefix stands in none but these rows; the slots of no token are NaN."""

    def __init__(
        self,
        prefixes: list[int],
        members: list[tuple[int, int]],
        kv_heads: int,
        head_dim: int,
        device: str = "cuda",
    ) -> None:
        lengths = [*(max(1, prefix) for prefix in prefixes), *(own for _, own in members)]
        super().__init__(lengths, kv_heads, head_dim, device=device)
        parts, rows, self._prefixes, self._members = self.block_table, self.rows, prefixes, members
        blocks = [prefixes[which] // BLOCK if which >= 0 else 0 for which, _ in members]
        self.rows = rows[len(prefixes) :]
        self.lengths = [BLOCK * count + own for count, (_, own) in zip(blocks, members, strict=True)]
        width = max(self.lengths) // BLOCK + 2
        self.block_table = on(device, torch.full((len(parts), width), int(parts.max()), dtype=torch.int32))
        for place, (count, (which, own)) in enumerate(zip(blocks, members, strict=True)):
            row, behind = int(self.rows[place]), count - (-own // BLOCK)
            if count:
                self.block_table[row, :count] = parts[int(rows[which]), :count]
            self.block_table[row, count:behind] = parts[row, : behind - count]

    def attention(self, i: int, queries: torch.Tensor, first: int, window: int) -> torch.Tensor:
        which, _ = self._members[i]
        kept = self.keys, self.values
        own = len(self._prefixes) + i
        try:
            if which >= 0 and self._prefixes[which]:
                joined = [torch.cat((tensors[which], tensors[own])) for tensors in kept]
            else:
                joined = [tensors[own] for tensors in kept]
            self.keys, self.values = [joined[0]], [joined[1]]
            return super().attention(0, queries, first, window)
        finally:
            self.keys, self.values = kept


class Decode:
    """The attention of all rows' last positions, with and without sharing, into tensors that stay where they are."""

    def __init__(self, ops: KernelOps, shape: KernelShape, paged: PagedRows, seed: int = 9) -> None:
        self.ops, self.shape, self.paged = ops, shape, paged
        random, self._ints, poisoned = makers(paged.device)
        ints = self._ints
        count = len(paged.lengths)
        self.group = shape.num_heads // shape.num_kv_heads
        self.qkv = random(count + 5, shape.qkv_size, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        self.q_start = on(paged.device, torch.randperm(count + 5, generator=generator)[:count].to(torch.int32))
        self.step = StepTensors(
            paged.rows.clone(), ints([1] * count), self.q_start, ints(paged.lengths), paged.block_table
        )
        self.most = sum(most_decode_items(shape, 1, length) for length in paged.lengths)
        self.work = DecodeItems(ints([[0] * 8] * self.most), ints([0]), 0)
        slots = self.most + count * MOST_PARTS
        self.scratch = DecodeScratch(
            poisoned(slots, shape.num_heads * (shape.head_dim + 2), dtype=torch.float32),
            ints([0] * count * shape.num_heads),
        )
        works = most_works(count, self.group, ops.prefill_tile_rows)
        self.lists = SharedPrefixes(ints([[0, 0]] * count), ints([0] * count), ints([[0] * 8] * works), ints([0]))
        self.out = poisoned(count + 5, shape.q_size)

    def plan(self) -> PrefixWork:
        """What the rows share, by the host's own functions, for the device."""
        rows = self.step.rows.cpu().numpy()
        computed = np.array(self.paged.lengths, np.int64) - 1
        groups = shared_prefixes(self.paged.block_table.cpu().numpy(), rows, computed, BLOCK)
        work = prefix_work(
            groups, rows, self.q_start.cpu().numpy(), np.arange(len(rows)), self.group, self.shape.num_kv_heads,
            self.ops.prefill_tile_rows, self.most,
        )  # fmt: skip
        self.set(work)
        return work

    def set(self, work: PrefixWork) -> None:
        ints = self._ints
        self.lists.prefixes.zero_()
        self.lists.prefixes[: len(work.prefixes)] = ints(work.prefixes)
        self.lists.query_tokens[: len(work.query_tokens)] = ints(work.query_tokens)
        self.lists.works[: len(work.works)] = ints(work.works.reshape(-1, 8))
        self.lists.num_works.fill_(len(work.works))

    def enqueue(self, shared: bool) -> None:
        count = len(self.paged.lengths)
        self.ops.plan_decode(self.step, count, self.work, tokens=count, shared=self.lists if shared else None)
        # Stands for qkv_epilogue: after plan_decode attention may not follow at once.
        self.out.fill_(float("nan"))
        if shared:
            self.ops.prefix_attention(self.qkv, self.paged.cache, self.step, self.lists, self.scratch)
        self.ops.decode_attention(
            self.qkv, self.paged.cache, self.step, self.work, self.scratch, self.out, count, after_prefix=shared
        )

    def result(self) -> torch.Tensor:
        """[rows, heads, head_dim], after looking at what must not have been touched."""
        assert not self.scratch.arrived.any()
        untouched = torch.ones(len(self.out), dtype=torch.bool, device=self.out.device)
        untouched[self.q_start.long()] = False
        assert torch.isnan(self.out[untouched]).all()
        return self.out[self.q_start.long()].view(-1, self.shape.num_heads, self.shape.head_dim)

    def run(self, shared: bool) -> torch.Tensor:
        self.scratch.partials.fill_(float("nan"))
        self.enqueue(shared)
        return self.result()

    def check(self, out: torch.Tensor) -> None:
        for i, length in enumerate(self.paged.lengths):
            query = self.qkv[int(self.q_start[i])][: self.shape.q_size].view(1, self.shape.num_heads, -1)
            assert error(out[i : i + 1], self.paged.attention(i, query, length - 1, 0)) < 1e-2, (i, length)


def make_decode(case: str, heads: int, kv_heads: int, head_dim: int) -> Decode:
    shape = make_shape(heads, kv_heads, head_dim)
    ops = make_ops(shape)
    if not ops.shares_prefixes:
        pytest.skip("prefix_attention needs compute capability 9.0")
    return Decode(ops, shape, SharedRows(*CASES[case], kv_heads, head_dim))


def check_shared(decode: Decode, prefixes: list[int], members: list[tuple[int, int]]) -> None:
    """Rows of SharedRows(prefixes, members, ...) with and without sharing."""
    planned = decode.plan().prefixes
    expected = [prefixes[which] if which >= 0 else 0 for which, _ in members]
    assert planned[:, 0].tolist() == expected[: len(planned)] and not any(expected[len(planned) :])
    shared, plain = decode.run(True), decode.run(False)
    decode.check(shared)
    assert torch.equal(decode.run(True), shared), "two equal runs differ"
    outside = torch.tensor([length == 0 for length in expected], device=shared.device)
    assert torch.equal(shared[outside], plain[outside]), "rows outside the group have other bits"


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("case", CASES)
def test_rows_behind_a_shared_prefix(case: str, heads: int, kv_heads: int, head_dim: int) -> None:
    check_shared(make_decode(case, heads, kv_heads, head_dim), *CASES[case])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (8, 2, 128)])
def test_a_graph_takes_whatever_its_lists_hold(heads: int, kv_heads: int, head_dim: int) -> None:
    """Captured without any work, replayed with much, with less, and with none again."""
    decode = make_decode("two prefixes and others", heads, kv_heads, head_dim)
    plain = decode.run(False)
    decode.enqueue(True)
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    decode.enqueue(True)
    graph.capture_end()
    work = decode.plan()
    first = work.works[:, 4] == 0
    fewer = PrefixWork(work.prefixes.copy(), work.query_tokens, work.works[first])
    fewer.prefixes[fewer.prefixes[:, 0] != work.works[first, 2].max()] = 0
    none = PrefixWork(work.prefixes[:0], work.query_tokens[:0], work.works[:0])
    for lists in (work, fewer, none, work):
        decode.set(lists)
        for _ in range(2):
            decode.scratch.partials.fill_(float("nan"))
            graph.replay()
            out = decode.result()
            decode.check(out)
            outside = torch.ones(len(out), dtype=torch.bool, device="cuda")
            outside[: len(lists.prefixes)] = torch.from_numpy(lists.prefixes[:, 0] == 0).cuda()
            assert torch.equal(out[outside], plain[outside])
