"""Which rows share a prefix, against brute force; the work that follows covers each key once; when lists are made anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.shapes import PREFIX_TILE
from worker.backends import cuda_prefix
from worker.backends.cuda_prefix import PrefixPlanner
from worker.backends.cuda_rows import DeviceRows
from worker.backends.shared_prefix import (
    MIN_ROWS,
    MIN_TOKENS,
    MOST_PARTS,
    PrefixGroup,
    most_works,
    part_tokens,
    prefix_work,
    shared_prefixes,
)
from worker.step import NewRow, SamplingParams, Step

NONE = np.zeros(0, np.int32)


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(table, rows, computed, block size): blocks by a tree of prefixes, as a prefix cache gives them out, or without any order."""
    block_size = draw(st.sampled_from([16, 48, 64, 256, 1024]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    max_rows, max_blocks = draw(st.integers(MIN_ROWS, 150)), 2560 // block_size + 2
    table = generator.integers(0, 3, (max_rows, max_blocks)).astype(np.int32)
    if draw(st.booleans()):
        branches = draw(st.integers(1, 3))
        table = np.zeros((max_rows, max_blocks), np.int32)
        seen: dict[tuple[int, ...], int] = {}
        parted = generator.random((max_rows, max_blocks)) < draw(st.sampled_from([0.0, 0.02, 0.2]))
        for row in range(max_rows):
            path: tuple[int, ...] = (int(generator.integers(branches)),)
            for column in range(max_blocks):
                path += (int(parted[row, column]) * (1 + row),)
                table[row, column] = seen.setdefault(path, len(seen))
    rows = generator.permutation(max_rows)[: draw(st.integers(1, max_rows))].astype(np.int32)
    computed = generator.integers(draw(st.sampled_from([0, 600, 2000])), max_blocks * block_size - 1, len(rows))
    return table, rows, computed, block_size


@settings(deadline=None, max_examples=150)
@given(tables())
def test_groups_share_what_they_claim_and_save_what_there_is_to_save(case: tuple[np.ndarray, ...]) -> None:
    table, rows, computed, block_size = case
    groups = shared_prefixes(table, rows, computed, int(block_size))
    taken = np.concatenate([NONE, *(group.places for group in groups)])
    assert len(set(taken.tolist())) == len(taken)
    for group in groups:
        assert len(group.places) >= MIN_ROWS and group.tokens >= MIN_TOKENS and group.tokens % PREFIX_TILE == 0
        assert (computed[group.places] >= group.tokens).all()
        shared = table[rows[group.places], : -(-group.tokens // block_size)]
        assert (shared == shared[0]).all()
        assert (np.diff(group.places) > 0).all()
    left = np.setdiff1d(np.arange(len(rows)), taken)
    alike: dict[tuple[int, ...], list[int]] = {}
    for place in left[computed[left] >= MIN_TOKENS].tolist():
        alike.setdefault(tuple(table[rows[place], : -(-MIN_TOKENS // block_size)].tolist()), []).append(place)
    forgotten = [places for places in alike.values() if len(places) >= MIN_ROWS]
    if table.max() >= 3:  # a tree: without order rows may hide among others that share the one block that is looked at
        assert not forgotten


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(MIN_ROWS, 90), st.integers(1, 40))
def test_a_group_takes_the_length_that_saves_most(seed: int, count: int, blocks: int) -> None:
    """All rows against the first one, each for its own number of blocks of 128."""
    generator = np.random.default_rng(seed)
    common = generator.integers(0, blocks + 1, count)
    common[0] = blocks
    table = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks) + blocks
    for row, shared in enumerate(common.tolist()):
        table[row, :shared] = np.arange(shared)
    computed = np.full(count, blocks * 128)
    best = 0
    for length in range(4, blocks + 1):
        if (members := int((common >= length).sum())) >= MIN_ROWS:
            best = max(best, (members - 1) * length)
    groups = shared_prefixes(table, np.arange(count, dtype=np.int32), computed, 128)
    found = [(len(group.places) - 1) * group.tokens // 128 for group in groups]
    assert sum(found) >= best and (best > 0) == bool(found)


def test_two_system_prompts_and_a_beginning_that_both_share() -> None:
    """A common template of 64 tokens joins nobody; rows that go on alone, and rows too young, stay outside."""
    table = np.arange(200 * 200, dtype=np.int32).reshape(200, 200) + 1000
    table[:, :4] = np.arange(4)
    table[0:100:2, 4:130] = np.arange(126) + 10
    table[1:100:2, 4:70] = np.arange(66) + 500
    computed = np.full(200, 2100)
    computed[[0, 1]] = 2079, 400
    rows = np.arange(200, dtype=np.int32)
    groups = shared_prefixes(table, rows, computed, 16)
    assert sorted((group.tokens, len(group.places)) for group in groups) == [(1024, 49), (2048, 50)]
    assert all(place % 2 == (group.tokens == 1024) for group in groups for place in group.places.tolist())
    computed[0] = 2047  # its 2048th token is computed in this step only
    groups = shared_prefixes(table, rows, computed, 16)
    assert sorted((group.tokens, len(group.places)) for group in groups) == [(1024, 49), (2048, 49)]
    assert shared_prefixes(table, rows[:40], computed[:40], 16) == []


def test_prompts_that_part_later_are_groups_of_their_own() -> None:
    """640 tokens in common, then 60 rows go on together up to 2,048 and 40 up to 1,280; three others end with the beginning."""
    table = np.arange(103 * 200, dtype=np.int32).reshape(103, 200) + 1000
    table[:, :40] = np.arange(40)
    table[3:63, 40:128] = np.arange(88) + 100
    table[63:, 40:80] = np.arange(40) + 300
    rows, computed = np.arange(103, dtype=np.int32), np.full(103, 3000)
    order = np.concatenate((np.arange(3, 103), np.arange(3)))  # the first row is one of the 60
    groups = shared_prefixes(table, rows[order], computed, 16)
    assert [(group.tokens, len(group.places)) for group in groups] == [(2048, 60), (1280, 40)]


def test_what_is_alike_behind_a_difference_is_not_shared() -> None:
    table = np.tile(np.arange(300, dtype=np.int32), (64, 1))
    table[::2, 40] = 1000
    groups = shared_prefixes(table, np.arange(64, dtype=np.int32), np.full(64, 4800), 16)
    assert sorted((group.tokens, len(group.places)) for group in groups) == [(4736, 32), (4736, 32)]
    table[1::2, 40] = np.arange(32) + 2000
    table[::2, 40] = np.arange(32) + 3000
    groups = shared_prefixes(table, np.arange(64, dtype=np.int32), np.full(64, 4800), 16)
    assert [(group.tokens, len(group.places)) for group in groups] == [(640, 64)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 4, 7, 32]), st.sampled_from([128, 192]))
def test_works_cover_each_key_of_each_query_head_once(seed: int, heads: int, tile_rows: int) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(MIN_ROWS, 200))
    rows = generator.permutation(300)[:count].astype(np.int32)
    step_places = np.sort(generator.permutation(250)[:count])
    tokens = generator.permutation(9000)[:count].astype(np.int32)
    order, groups = generator.permutation(count), []
    while len(order) >= MIN_ROWS:
        size = int(generator.integers(MIN_ROWS, len(order) + 1))
        groups.append(PrefixGroup(np.sort(order[:size]), int(generator.integers(4, 200)) * PREFIX_TILE))
        order = order[size:]
    work = prefix_work(groups, rows, tokens, step_places, heads, 8, tile_rows, 1000)
    assert len(work.works) <= most_works(count, heads, tile_rows)
    left: dict[tuple[int, int, int], tuple[int, int, int]] = {}  # (slot, token, head): (row read, begin, end)
    for row, begin, end, tile, first, size, slot, stride in work.works.tolist():
        assert begin % PREFIX_TILE == end % PREFIX_TILE == 0 and begin < end
        for pair in range(tile * tile_rows, min(tile * tile_rows + tile_rows, size * heads)):
            key = (slot + pair // heads * stride, int(work.query_tokens[first + pair // heads]), pair % heads)
            assert key not in left
            left[key] = (row, begin, end)
    assert len({(slot, head) for slot, _, head in left}) == len(left)
    for group in groups:
        for place in group.places.tolist():
            length, word = work.prefixes[step_places[place]].tolist()
            assert length == group.tokens
            for head in range(heads):
                assert word % 32 <= MOST_PARTS
                parts = [left.pop((word // 32 + i, int(tokens[place]), head)) for i in range(word % 32)]
                assert {row for row, _, _ in parts} == {int(rows[group.places[0]])}
                assert [begin for _, begin, _ in parts] == [0, *(end for _, _, end in parts[:-1])]
                assert parts[-1][2] == length
    assert not left
    outside = np.setdiff1d(np.arange(len(work.prefixes)), step_places[np.concatenate([g.places for g in groups])])
    assert not work.prefixes[outside].any()
    assert work.prefixes[:, 1].max() // 32 < 1000 + count * MOST_PARTS


def test_parts_fill_the_chip_and_are_no_more_than_that() -> None:
    """Llama-3.1-8B's tiles of 128 queries of 8 KV heads: 33, 128, 256 rows; a prefix is never cut finer than tiles."""
    assert [part_tokens(2048, 8 * tiles) for tiles in (2, 4, 8)] == [256, 512, 1024]
    assert [part_tokens(tokens, 16) for tokens in (512, 8192, 32768)] == [128, 1024, 4096]
    for tiles in range(1, 300):
        for keys in range(4, 300):
            part = part_tokens(keys * PREFIX_TILE, tiles)
            assert part % PREFIX_TILE == 0 and -(-keys * PREFIX_TILE // part) <= MOST_PARTS


class _Ops:
    """Does on the host what kernels/row_state.cu does."""

    def apply_plan(self, arena: torch.Tensor, plan: torch.Tensor, words: int, segments: int) -> None:
        for to, source, length in plan[words:].view(segments, 3).tolist():
            arena[to : to + length] = plan[source : source + length]


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> tuple[PrefixPlanner, DeviceRows, list[int]]:
    """Rows 0 to 79 behind 1,024 shared tokens, 32 of their own and one unknown yet; and how many rows each look was about."""
    ops: Any = _Ops()
    rows = DeviceRows(ops, 100, 2048, 16, 100, torch.device("cpu"))
    shared = np.arange(64, dtype=np.int32)
    new = tuple(
        NewRow(i, np.zeros(1057, np.int32), 1056, 1056, np.append(shared, 64 + 3 * i + np.arange(3)).astype(np.int32), i,
               SamplingParams())
        for i in range(80)
    )  # fmt: skip
    rows.apply(Step(0, NONE, new, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE))
    looked: list[int] = []

    def look(*arguments: Any) -> list[PrefixGroup]:
        looked.append(len(arguments[1]))
        return shared_prefixes(*arguments)

    monkeypatch.setattr(cuda_prefix, "shared_prefixes", look)
    return PrefixPlanner(rows, 100, 4, 8, 192, 5000, torch.device("cpu")), rows, looked


def test_the_host_knows_the_block_tables(planner: tuple[PrefixPlanner, DeviceRows, list[int]]) -> None:
    _, rows, _ = planner
    again = NewRow(5, np.zeros(17, np.int32), 17, 0, np.array([90, 91], np.int32), 0, SamplingParams())
    appended, blocks = np.array([5, 79, 5], np.int32), np.array([92, 93, 94], np.int32)
    rows.apply(Step(1, np.array([5], np.int32), (again,), appended, blocks, NONE, NONE, NONE, NONE, NONE, NONE))
    assert rows.blocks[5, :4].tolist() == [90, 91, 92, 94] and rows.blocks[79, 66:68].tolist() == [64 + 3 * 79 + 2, 93]
    for row in range(80):
        count = int(rows.num_blocks[row])
        assert rows.blocks[row, :count].tolist() == rows.block_table[row, :count].tolist()


def step_of(rows: np.ndarray, scheduled: np.ndarray | None = None) -> Step:
    scheduled = np.ones(len(rows), np.int32) if scheduled is None else scheduled
    return Step(1, NONE, (), NONE, NONE, NONE, NONE, NONE, rows, scheduled, np.ones(len(rows), np.int32))


def test_lists_are_made_where_rows_change(planner: tuple[PrefixPlanner, DeviceRows, list[int]]) -> None:
    plan, rows, looked = planner
    all_rows = np.arange(80, dtype=np.int32)[::-1].copy()
    for _ in range(3):
        assert plan.plan(step_of(all_rows), np.arange(80, dtype=np.int32), 80)
        rows.computed[all_rows] += 1
    assert looked == [80]
    lists = plan.lists
    assert lists.num_works.tolist() == [2 * 4]  # 320 pairs in tiles of 192, 1,024 tokens in parts of 256
    assert lists.works[:4].tolist() == [
        [79, 0, 256, 0, 0, 80, 5000, 4],
        [79, 0, 256, 1, 0, 80, 5000, 4],
        [79, 256, 512, 0, 0, 80, 5001, 4],
        [79, 256, 512, 1, 0, 80, 5001, 4],
    ]
    assert lists.prefixes[3].tolist() == [1024, (5000 + 3 * 4) * 32 + 4]
    assert lists.query_tokens[:80].tolist() == list(range(80))
    assert plan.plan(step_of(all_rows[:70]), np.arange(70, dtype=np.int32), 70)
    assert not lists.prefixes[70:].any()
    plan.forget()
    assert plan.plan(step_of(all_rows[:70]), np.arange(70, dtype=np.int32), 70)
    scheduled = np.ones(70, np.int32)
    scheduled[69] = 2
    assert plan.plan(step_of(all_rows[:70], scheduled), np.arange(70, dtype=np.int32), 71)
    assert looked == [80, 70, 70, 69]


def test_up_to_64_tokens_nothing_is_shared(planner: tuple[PrefixPlanner, DeviceRows, list[int]]) -> None:
    plan, _, looked = planner
    for count in (64, 31):
        assert not plan.plan(step_of(np.arange(count, dtype=np.int32)), np.arange(count, dtype=np.int32), count)
    assert looked == []


def test_chunks_of_a_step_stay_outside(planner: tuple[PrefixPlanner, DeviceRows, list[int]]) -> None:
    plan, _, looked = planner
    scheduled = np.ones(40, np.int32)
    scheduled[[0, 7]] = 30, 20
    q_start = (np.cumsum(scheduled) - scheduled).astype(np.int32)
    assert plan.plan(step_of(np.arange(40, dtype=np.int32), scheduled), q_start, 88)
    assert looked == [38]
    assert plan.lists.query_tokens[:38].tolist() == [*range(30, 36), *range(56, 88)]
    assert plan.lists.works[0].tolist() == [1, 0, 128, 0, 0, 38, 5000, 8]
    assert plan.lists.prefixes[[0, 7]].tolist() == [[0, 0], [0, 0]]
    assert (plan.lists.prefixes[[*range(1, 7), *range(8, 40)], 0] == 1024).all()
