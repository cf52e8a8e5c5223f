"""What a step tells the device: its columns, packed into pinned memory, and the tensors that kernels and graphs read them from.

A step that has more than one token a row and fits into a `MixedShape` is padded to it, so that it is a graph, too: rows beyond the
step's have no tokens, tokens beyond the step's belong to the first of these rows, and tiles beyond the step's name row -1.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels.operands import StepTensors
from worker.step import Int32Array, Step

Int64Array = npt.NDArray[np.int64]

_COLUMNS = 6  # rows, num_scheduled, q_start, sample_rows, tokens whose logits are wanted, where the result goes
_TILE_COLUMNS = 2  # pairs, one behind another
_MIXED_TOKENS = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_FEW_ROWS = 8
_SPARE_TILES = (4, 32)  # each chunk may leave a tile begun


@dataclass(frozen=True, slots=True)
class MixedShape:
    """What a graph of a step with chunks was captured for: the step has fewer rows and at most so many tokens and tiles."""

    tokens: int
    rows: int
    tiles: int


class MixedShapes:
    """The shapes that a worker captures: dense in tokens, few in the rest, which costs next to nothing."""

    def __init__(self, max_rows: int, max_tokens: int, group: int, tile_rows: int) -> None:
        """`max_tokens`: of a step at most; `group`: query heads of a KV head; `tile_rows`: pairs (token, query head) of a tile."""
        self._tokens = [size for size in _MIXED_TOKENS if size <= max_tokens]
        self._rows = sorted({min(_FEW_ROWS, max_rows + 1), max_rows + 1})
        self._group, self._tile_rows = group, tile_rows
        self.max_tiles = self._tiles(_MIXED_TOKENS[-1], _SPARE_TILES[-1])

    def __iter__(self) -> Iterator[MixedShape]:
        """Those that are worth having before they are needed: with few chunks."""
        for tokens in self._tokens:
            for rows in self._rows:
                yield MixedShape(tokens, rows, self._tiles(tokens, _SPARE_TILES[0]))

    def find(self, tokens: int, rows: int, tiles: int) -> MixedShape | None:
        """The smallest that holds such a step, or None."""
        at = bisect_left(self._tokens, tokens)
        if at == len(self._tokens):
            return None
        padded = self._tokens[at]
        for spare in _SPARE_TILES:
            if tiles <= self._tiles(padded, spare):
                return MixedShape(padded, next(size for size in self._rows if size > rows), self._tiles(padded, spare))
        return None

    def _tiles(self, tokens: int, spare: int) -> int:
        return tokens * self._group // self._tile_rows + spare


class StepColumns:
    """The device's side, int32. Written by the step's first kernel only (`KernelOps.copy_words`)."""

    def __init__(self, max_rows: int, max_tiles: int, block_table: torch.Tensor, device: torch.device) -> None:
        # One row more, which may be padding; pairs of words, so that tiles stand at a multiple of eight bytes.
        self.width = max(max_rows + 1, max_tiles, 2)
        self.size = (_COLUMNS + _TILE_COLUMNS, self.width)
        self.all = torch.zeros(self.size, dtype=torch.int32, device=device)
        self.without_tiles = self.all[:_COLUMNS]
        rows, num_scheduled, q_start, self.sample_rows, self.last, self.result_at = self.without_tiles
        context_lens = torch.zeros(self.width, dtype=torch.int32, device=device)
        self.step = StepTensors(rows, num_scheduled, q_start, context_lens, block_table)
        self.tiles = self.all[_COLUMNS:].view(-1, 2)
        """[tiles, 2] (row of the step, tile)."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where a step's rows and tokens lie: the same for steps of the same rows, so that a steady decode lays out nothing."""

    rows: Int32Array  # [R] of the step, and so the next two
    num_scheduled: Int32Array
    num_samples: Int32Array
    total: int
    q_start: Int32Array  # [R] each row's first token
    sampling: Int64Array  # [S] which rows of the step sample
    sample_rows: Int32Array  # [S] those rows
    columns: Int32Array  # [6, width] but for `result_at`

    @property
    def one_token_each(self) -> bool:
        """Whether every row has a single token."""
        return self.total == len(self.rows)

    def holds_for(self, step: Step) -> bool:
        """Whether the step has the same rows, tokens and samples."""
        return (
            same(step.rows, self.rows)
            and same(step.num_scheduled, self.num_scheduled)
            and same(step.num_samples, self.num_samples)
        )


def same(left: Int32Array, right: Int32Array) -> bool:
    """Whether two columns are equal; those of plans of the same rows are one object (worker/plan_codec.py)."""
    return left is right or np.array_equal(left, right)


def lay_out(step: Step, width: int) -> StepLayout:
    """Tokens row after row. What is beyond the step's rows in `columns` is padding: a row there has no tokens and no sample."""
    rows, scheduled = step.rows, step.num_scheduled
    ends = np.cumsum(scheduled, dtype=np.int64)
    q_start = (ends - scheduled).astype(np.int32)
    sampling = np.flatnonzero(step.num_samples)
    sample_rows = rows[sampling]
    columns = np.zeros((_COLUMNS, width), np.int32)
    count = len(rows)
    columns[0, :count], columns[1, :count], columns[2, :count] = rows, scheduled, q_start
    columns[3:5] = -1
    columns[3, : len(sampling)], columns[4, : len(sampling)] = sample_rows, ends[sampling] - 1
    total = int(ends[-1]) if count else 0
    return StepLayout(rows, scheduled, step.num_samples, total, q_start, sampling, sample_rows, columns)


def pad_decode(columns: Int32Array, count: int, bucket: int) -> None:
    """Rows up to `bucket` get a token each, which is padding."""
    columns[2, count:bucket] = np.arange(count, bucket)


def pad_mixed(columns: Int32Array, count: int, total: int, tiles: Int32Array, shape: MixedShape) -> None:
    """`count` rows with `total` tokens and `tiles` int32 [n, 2] become a step of the shape; `columns` int32 [8, width]."""
    columns[2, count] = total  # this row's padding goes on to the next row's
    columns[2, count + 1 : shape.rows] = shape.tokens
    words = columns[_COLUMNS:].reshape(-1)
    words[: tiles.size] = tiles.reshape(-1)
    words[tiles.size : 2 * shape.tiles] = -1
