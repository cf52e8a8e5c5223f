"""Attention over the paged KV cache, in products whose bits do not depend on a row's neighbours.

A step's tokens are cut into *tiles*: up to `tile_tokens` consecutive tokens of one row. Keys are cut into *splits* of a
fixed number of positions, counted from position 0. A (tile, split) pair is a *unit*, and every unit is the same product

    softmax([tile_tokens * group, head_dim] x [head_dim, split]) x [split, head_dim]        group = query heads per KV head

however many rows a step has, how long they are or how they were chunked. torch's FlashAttention for CPUs computes all units of a
step at once, in the cache's dtype with float32 sums; the splits of a tile are then merged in order (Flash-Decoding,
Dao et al. 2023: each split's softmax weighted by its log-sum-exp). A unit keeps its bits under any number of units and of
tokens in its tile, as long as it has three rows (measured with bfloat16, held by tests/unit/test_worker_backend.py).

`AttentionPlan` is made once a step from positions and block tables and serves every layer with the same window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from worker.model.kv_cache import PagedKVCache

SPLIT = 128
"""Key positions a unit, rounded to whole blocks."""

_TILES = (128, 64, 32)  # tokens of a chunk's tiles; a larger one reads the keys less often
_LEAST_ROWS = 3  # products of one or two rows take other code paths, with other bits
_MASKED = -1e30  # finite: a split that a token does not see at all must not make NaN
_MAX_SLICE_BYTES = 64 << 20  # of gathered keys and values

_flash = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
)  # also gives the log-sum-exp, which the public one keeps

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The tokens of one row in this step: positions start .. start + count, the first of them token number `first`."""

    start: int
    count: int
    first: int
    blocks: npt.NDArray[np.int32]  # [blocks of the row]


@dataclass(frozen=True, slots=True)
class _Slice:
    """Tiles that are computed at once. U units, N tiles, T tokens a tile."""

    tile_tokens: int
    queries: torch.Tensor | None  # int64 [U * T] token number of each query of each unit; None: unit i asks for token i
    kv_index: torch.Tensor  # int64, index of the cache for the blocks of all units
    mask: torch.Tensor  # float32 [U, 1, T * group, split], added to the scores
    merge: torch.Tensor | None  # int64 [N * S] unit of each split of each tile, None: one split each
    merge_mask: torch.Tensor | None  # float32 [N, S, 1, 1], masks the places that stand for no split
    places: torch.Tensor | None  # int64 [tokens] where the output of each token is among the N * T; None: place i
    tokens: torch.Tensor  # int64 [tokens] its token number


@dataclass(frozen=True, slots=True)
class _Tile:
    row: RowSpan
    start: int  # first position
    count: int
    first_split: int
    num_splits: int


def split_size(block_size: int) -> int:
    """Key positions a unit."""
    return max(1, SPLIT // block_size) * block_size


class AttentionPlan:
    """What attention reads and where its results go, for one step and one sliding window."""

    def __init__(self, rows: list[RowSpan], cache: PagedKVCache, group: int, window: int | None) -> None:
        self.num_tokens = sum(row.count for row in rows)
        self._group = group
        decode_tile = -(-_LEAST_ROWS // group) if group < 3 else 1
        split = split_size(cache.block_size)
        tiles: dict[int, list[_Tile]] = {
            -(-_LEAST_ROWS // group) if group < _LEAST_ROWS else 1: [],
            **{t: [] for t in _TILES},
        }
        decode_tile = next(iter(tiles))
        for row in rows:
            offset = 0
            while offset < row.count:
                left = row.count - offset
                size = decode_tile if row.count == 1 else next((t for t in _TILES if t <= left), _TILES[-1])
                tiles[size].append(_tile(row, offset, min(size, left), split, window))
                offset += size
        max_units = max(1, _MAX_SLICE_BYTES // (split * cache.bytes_per_slot))
        self._slices = [
            _slice(part, size, cache, split, group, window)
            for size, kind in tiles.items()
            for part in _bounded(kind, max_units)
        ]

    def attend(self, layer: int, cache: PagedKVCache, queries: torch.Tensor) -> torch.Tensor:
        """Attention of queries float32 [tokens, num_heads, head_dim], scaled already, over what the cache holds.

        The step's own keys and values must have been written. Returns float32 [tokens, num_heads * head_dim].
        """
        if len(self._slices) == 1:
            return _attend_slice(self._slices[0], layer, cache, queries, self._group)
        result = queries.new_empty((self.num_tokens, queries.shape[1] * queries.shape[2]))
        for part in self._slices:
            result.index_copy_(0, part.tokens, _attend_slice(part, layer, cache, queries, self._group))
        return result


def _attend_slice(part: _Slice, layer: int, cache: PagedKVCache, queries: torch.Tensor, group: int) -> torch.Tensor:
    """One slice: float32 [tokens of the slice, num_heads * head_dim]."""
    num_heads, head_dim = queries.shape[1:]
    kv_heads = num_heads // group
    tokens, units, split = part.tile_tokens, part.mask.shape[0], part.mask.shape[-1]
    keys, values = cache.read(layer, part.kv_index).view(2, kv_heads, units, split, head_dim).transpose(1, 2)
    q = queries[: units * tokens] if part.queries is None else queries.index_select(0, part.queries)
    q = q.view(units, tokens, kv_heads, group, head_dim).transpose(1, 2)
    q = q.to(keys.dtype, memory_format=torch.contiguous_format).reshape(units, kv_heads, tokens * group, head_dim)
    output: torch.Tensor
    output, log_sum = _flash(q, keys, values, attn_mask=part.mask, scale=1.0)
    if part.merge is not None and part.merge_mask is not None:
        output = _merge(output.float(), log_sum, part.merge, part.merge_mask)
    output = output.view(-1, kv_heads, tokens, group, head_dim).transpose(1, 2)
    output = output.to(torch.float32, memory_format=torch.contiguous_format).reshape(-1, num_heads * head_dim)
    return output[: len(part.tokens)] if part.places is None else output.index_select(0, part.places)


def _merge(output: torch.Tensor, log_sum: torch.Tensor, merge: torch.Tensor, merge_mask: torch.Tensor) -> torch.Tensor:
    """Merge the splits of each tile: output [U, kv_heads, M, head_dim] and log_sum [U, kv_heads, M] to [N, kv_heads, M, head_dim].

    `cumsum` adds in order of the splits, so places that hold no split (weight 0, at the end) change nothing; `sum` would not
    promise that. A tile with one split keeps its bits: its weight is exactly 1.
    """
    tiles, splits = merge_mask.shape[:2]
    output = output.index_select(0, merge).view(tiles, splits, *output.shape[1:])
    log_sum = log_sum.index_select(0, merge).view(tiles, splits, *log_sum.shape[1:]) + merge_mask
    weights = (log_sum - log_sum.amax(1, keepdim=True)).exp()
    merged = (output * weights.unsqueeze(-1)).cumsum(1)[:, -1]
    return merged / weights.cumsum(1)[:, -1].unsqueeze(-1)


def _tile(row: RowSpan, offset: int, count: int, split: int, window: int | None) -> _Tile:
    start = row.start + offset
    lowest = 0 if window is None else max(0, start - window + 1)
    first_split = lowest // split
    return _Tile(row, start, count, first_split, (start + count - 1) // split + 1 - first_split)


def _bounded(tiles: list[_Tile], max_units: int) -> Iterator[list[_Tile]]:
    """Cut a list of tiles where its units would pass the bound; one tile is never cut."""
    batch: list[_Tile] = []
    units = 0
    for tile in tiles:
        if batch and units + tile.num_splits > max_units:
            yield batch
            batch, units = [], 0
        batch.append(tile)
        units += tile.num_splits
    if batch:
        yield batch


def _slice(
    tiles: list[_Tile], tile_tokens: int, cache: PagedKVCache, split: int, group: int, window: int | None
) -> _Slice:
    num_splits = np.array([tile.num_splits for tile in tiles])
    counts = np.array([tile.count for tile in tiles])
    starts = np.array([tile.start for tile in tiles])
    firsts = np.array([tile.row.first + tile.start - tile.row.start for tile in tiles])
    first_units = np.cumsum(num_splits) - num_splits
    # A tile with fewer tokens than its size repeats its last one; nobody reads those results.
    offsets = np.minimum(np.arange(tile_tokens), counts[:, None] - 1)
    unit_tile = np.repeat(np.arange(len(tiles)), num_splits)
    unit_split = (
        np.arange(len(unit_tile)) - first_units[unit_tile] + np.array([t.first_split for t in tiles])[unit_tile]
    )
    key_positions = unit_split[:, None] * split + np.arange(split)
    query_positions = (starts[:, None] + offsets)[unit_tile]
    visible = key_positions[:, None, :] <= query_positions[:, :, None]
    if window is not None:
        visible &= key_positions[:, None, :] > query_positions[:, :, None] - window
    blocks = _blocks(tiles, key_positions, visible.any(1), unit_tile, cache)
    merge, merge_mask = _merge_plan(num_splits, first_units)
    places = np.concatenate([np.arange(tile.count) + i * tile_tokens for i, tile in enumerate(tiles)])
    tokens = np.concatenate([np.arange(tile.count) + first for tile, first in zip(tiles, firsts, strict=True)])
    return _Slice(
        tile_tokens=tile_tokens,
        queries=_unless_identity((firsts[:, None] + offsets)[unit_tile].reshape(-1)),
        kv_index=cache.block_index(torch.from_numpy(blocks.reshape(-1))),
        mask=torch.from_numpy(np.where(visible, np.float32(0), np.float32(_MASKED)).repeat(group, 1)).unsqueeze(1),
        merge=merge,
        merge_mask=merge_mask,
        places=_unless_identity(places),
        tokens=torch.from_numpy(tokens),
    )


def _unless_identity(index: Int64Array) -> torch.Tensor | None:
    """The index, or None where it is 0, 1, 2 ...: the usual case of a step of decodes, which then gathers nothing."""
    return None if np.array_equal(index, np.arange(len(index))) else torch.from_numpy(index)


def _blocks(
    tiles: list[_Tile],
    positions: Int64Array,
    needed: npt.NDArray[np.bool_],
    unit_tile: Int64Array,
    cache: PagedKVCache,
) -> Int64Array:
    """Blocks of the key positions [U, split], as [U, split / block_size]; the null block where no token of the tile sees any."""
    widest = max(len(tile.row.blocks) for tile in tiles)
    tables = np.zeros((len(tiles), widest), np.int64)
    for i, tile in enumerate(tiles):
        tables[i, : len(tile.row.blocks)] = tile.row.blocks
    places = positions[:, :: cache.block_size] // cache.block_size
    blocks = tables[unit_tile[:, None], np.minimum(places, widest - 1)]
    any_needed = needed.reshape(*places.shape, cache.block_size).any(-1)
    return np.where(any_needed, blocks, cache.null_block)


def _merge_plan(num_splits: Int64Array, first_units: Int64Array) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    most = int(num_splits.max())
    if most == 1:
        return None, None
    splits = np.arange(most)
    present = splits < num_splits[:, None]
    units = np.where(present, first_units[:, None] + splits, first_units[:, None])
    mask = np.where(present, np.float32(0), np.float32(-np.inf))
    return torch.from_numpy(units.reshape(-1)), torch.from_numpy(mask)[:, :, None, None]
