"""What a step's attention reads, and the launch of its kernel (worker/cpu/attention.py).

A sequence's tokens in this step are cut into tiles of query rows. Decodes have tiles as large as a group of query heads, all else
tiles of `ROWS`; each kind is one launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from worker.cpu.attention import ROWS, TILE_FIELDS
from worker.cpu.compiler import Kernels
from worker.model.kv_cache import PagedKVCache

_NO_WINDOW = 1 << 40


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The tokens of one row in this step: positions start .. start + count, the first of them token number `first`."""

    start: int
    count: int
    first: int
    blocks: npt.NDArray[np.int32]  # [blocks of the row]


class AttentionPlan:
    """Tiles of one step, for every layer."""

    def __init__(self, rows: list[RowSpan], group: int) -> None:
        self._tables = np.concatenate([row.blocks for row in rows]).astype(np.int32)
        starts = np.cumsum([0, *(len(row.blocks) for row in rows)])
        decode = min(group, ROWS)
        kinds: dict[int, list[npt.NDArray[np.int64]]] = {decode: [], ROWS: []}
        for row, table in zip(rows, starts.tolist(), strict=False):
            size = decode if row.count == 1 else ROWS
            queries = np.arange(0, row.count * group, size, dtype=np.int64)
            tiles = np.empty((len(queries), TILE_FIELDS), np.int64)
            tiles[:] = row.first, 0, row.count * group, row.start, table
            tiles[:, 1] = queries
            kinds[size].append(tiles)
        self._tiles = {size: np.concatenate(tiles) for size, tiles in kinds.items() if tiles}
        self._addresses = {size: tiles.ctypes.data for size, tiles in self._tiles.items()}
        self._tables_at = self._tables.ctypes.data

    def attend(
        self,
        kernels: Kernels,
        layer: int,
        cache: PagedKVCache,
        queries: torch.Tensor,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        """Attention of queries, scaled already, over what the cache holds; the step's own keys and values must have been written.

        queries float32 [tokens, at least num_heads * head_dim], out float32 [tokens, num_heads * head_dim].
        """
        for rows, tiles in self._tiles.items():
            arguments = (
                queries.data_ptr(),
                queries.stride(0),
                out.data_ptr(),
                cache.keys_at(layer),
                cache.values_at(layer),
                cache.head_stride,
                self._addresses[rows],
                self._tables_at,
                len(tiles),
                window or _NO_WINDOW,
            )
            kernels.launch(f"attention_{rows}", arguments, torch.get_num_threads())
