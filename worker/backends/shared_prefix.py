"""Which rows of a step read a prefix together, and the work of kernels/prefix_attention.cu that follows: pure, from host tables.

Rows whose block tables begin with the same blocks share what stands there: the prefix cache gave it to them. Only keys and values that
were computed before the step count, so of each row at least the newest token stays its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels.shapes import PREFIX_TILE

MIN_ROWS = 32
"""A group of fewer rows reads its prefix as ever: their keys come from the L2 cache, and they would not fill tiles."""

MIN_TOKENS = 512
MOST_PARTS = 16
"""Parts of a prefix at most: each leaves a partial result for each row and head."""

_BLOCKS = 132  # of a Hopper chip; a constant, since the order of sums follows from it
_MOST_GROUPS = 8  # of rows that share their first MIN_TOKENS
_COLUMNS = 128  # of block tables that are compared at a time

Int32Array = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Rows that share `tokens` tokens, a multiple of PREFIX_TILE: int64 [n] places in the rows asked about, in rising order."""

    places: IntArray
    tokens: int


@dataclass(frozen=True, slots=True)
class PrefixWork:
    """What the kernels read, in the layout of kernels.operands.SharedPrefixes."""

    prefixes: Int32Array  # [rows of the step, 2]
    query_tokens: Int32Array  # [rows in groups]
    works: Int32Array  # [works, 8]


def shared_prefixes(table: Int32Array, rows: Int32Array, computed: IntArray, block_size: int) -> list[PrefixGroup]:
    """Groups of at least MIN_ROWS rows with a common prefix of at least MIN_TOKENS; no row is in two.

    `table` int32 [max_rows, max_blocks], of which the first `computed` [R] tokens of each row of `rows` [R] count. Where rows share
    more or less with one another, a group takes as many tokens as saves most reading.
    """
    first = max(MIN_TOKENS // block_size, 1) - 1
    candidates = np.flatnonzero(computed >= MIN_TOKENS)
    if len(candidates) < MIN_ROWS:
        return []
    ids = table[rows[candidates], first]  # the same block there says in practice that all before are the same, too
    order = np.argsort(ids, kind="stable")
    groups: list[PrefixGroup] = []
    ends = np.flatnonzero(np.diff(ids[order], append=-1)) + 1  # no block is -1
    starts = np.append(0, ends[:-1])
    for start, end in zip(starts[ends - starts >= MIN_ROWS], ends[ends - starts >= MIN_ROWS], strict=True):
        places = candidates[order[start:end]]
        for _ in range(_MOST_GROUPS):
            if len(places) < MIN_ROWS:
                break
            group = _best_group(table, rows[places], computed[places], block_size)
            if group is None:
                places = places[1:]  # what the others share among themselves
                continue
            groups.append(PrefixGroup(places[group.places], group.tokens))
            places = np.delete(places, group.places)
    return groups


def part_tokens(prefix: int, tiles: int) -> int:
    """Tokens of each part but the last of a prefix of so many, for `tiles` tiles of queries, those of all KV heads.

    The shortest time, in tiles of keys: so many rounds of blocks, each with a part and as much as two tiles to begin and to end;
    and what the partial results take to be written and read.
    """
    keys = prefix // PREFIX_TILE

    def cost(parts: int) -> float:
        return -(-tiles * parts // _BLOCKS) * (-(-keys // parts) + 2) + parts * tiles / 64

    return -(-keys // min(range(1, min(keys, MOST_PARTS) + 1), key=cost)) * PREFIX_TILE


def prefix_work(
    groups: list[PrefixGroup],
    rows: Int32Array,
    query_tokens: Int32Array,
    step_places: IntArray,
    heads_per_group: int,
    kv_heads: int,
    tile_rows: int,
    first_slot: int,
) -> PrefixWork:
    """The lists of a step.

    rows int32 [R] permanent rows, query_tokens int32 [R] their tokens, step_places [R] their places in the step; `tile_rows` pairs
    (row, query head) of a tile, `heads_per_group` query heads of a KV head. Partial results lie from `first_slot` on, those of a
    row's parts side by side: at most MOST_PARTS a row.
    """
    prefixes = np.zeros((int(step_places.max(initial=-1)) + 1, 2), np.int32)
    works: list[npt.NDArray[np.int64]] = []
    tokens: list[Int32Array] = []
    taken, slot = 0, first_slot
    for group in groups:
        count = len(group.places)
        tiles = -(-count * heads_per_group // tile_rows)
        part = part_tokens(group.tokens, tiles * kv_heads)
        parts = -(-group.tokens // part)
        which, tile = np.divmod(np.arange(parts * tiles), tiles)
        work = np.empty((len(which), 8), np.int64)
        work[:, 0] = rows[group.places[0]]
        work[:, 1] = which * part
        work[:, 2] = np.minimum(which * part + part, group.tokens)
        work[:, 3] = tile
        work[:, 4], work[:, 5] = taken, count
        work[:, 6], work[:, 7] = slot + which, parts
        works.append(work)
        places = step_places[group.places]
        prefixes[places, 0] = group.tokens
        prefixes[places, 1] = (slot + np.arange(count) * parts) * 32 + parts
        tokens.append(query_tokens[group.places])
        taken, slot = taken + count, slot + count * parts
    none = np.zeros(0, np.int32)
    found = np.concatenate(works).astype(np.int32) if works else none.reshape(0, 8)
    return PrefixWork(prefixes, np.concatenate([none, *tokens]), found)


def most_works(max_rows: int, heads_per_group: int, tile_rows: int) -> int:
    """Works of a step of so many rows at most: each group may leave its last tile unfilled."""
    return (max_rows * heads_per_group // tile_rows + max_rows // MIN_ROWS) * MOST_PARTS


def _best_group(table: Int32Array, rows: Int32Array, computed: IntArray, block_size: int) -> PrefixGroup | None:
    """The rows that share most with the first one: of all lengths that at least MIN_ROWS rows reach the one that saves most."""
    shared = np.minimum(_common_blocks(table, rows, int(computed.max()) // block_size) * block_size, computed)
    shared -= shared % PREFIX_TILE
    falling = np.sort(shared)[::-1]
    # The k longest share what the k-th has, and one of them has to read it anyway.
    saved = falling * np.arange(len(falling))
    saved[: MIN_ROWS - 1] = 0
    saved[falling < MIN_TOKENS] = 0
    best = int(saved.argmax())
    if saved[best] == 0:
        return None
    return PrefixGroup(np.flatnonzero(shared >= falling[best]), int(falling[best]))


def _common_blocks(table: Int32Array, rows: Int32Array, limit: int) -> IntArray:
    """How many of the first `limit` blocks each of `rows` has in common with the first of them."""
    found = np.zeros(len(rows), np.int64)
    alive = np.arange(len(rows))
    for start in range(0, limit, _COLUMNS):
        end = min(limit, start + _COLUMNS)
        same = table[rows[alive], start:end] == table[rows[0], start:end]
        whole = same.all(axis=1)
        found[alive] += np.where(whole, end - start, same.argmin(axis=1))
        alive = alive[whole]
        if len(alive) < MIN_ROWS:  # what fewer rows share beyond is no group's
            break
    return found
