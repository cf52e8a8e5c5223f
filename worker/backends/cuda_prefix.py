"""The device's lists of shared prefixes, kept as long as the same rows decode.

They change with the rows of a step, not from token to token: a row's prefix lies behind it. So a steady step costs a comparison of
two short arrays.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.operands import SharedPrefixes
from kernels.product_rows import PARTS_ROWS
from worker.backends.cuda_columns import same
from worker.backends.cuda_rows import DeviceRows, upload
from worker.backends.shared_prefix import MIN_ROWS, most_works, prefix_work, shared_prefixes
from worker.step import Int32Array, Step

_HEADER = 8  # words before the lists: the number of works


class PrefixPlanner:
    """Owns the lists, in one buffer. Only the launch thread uses it, with the backend's stream current."""

    def __init__(
        self,
        rows: DeviceRows,
        max_rows: int,
        heads_per_group: int,
        kv_heads: int,
        tile_rows: int,
        first_slot: int,
        device: torch.device,
    ) -> None:
        """`first_slot`: of the partial results that are kept for prefixes, MOST_PARTS a row."""
        self._rows = rows
        self._device = device
        self._heads_per_group = heads_per_group
        self._kv_heads = kv_heads
        self._tile_rows = tile_rows
        self._first_slot = first_slot
        self._tokens_at = _HEADER + 2 * max_rows
        self._works_at = -(-(self._tokens_at + max_rows) // 8) * 8
        works = most_works(max_rows, heads_per_group, tile_rows)
        self._buffer = torch.zeros(self._works_at + 8 * works, dtype=torch.int32, device=device)
        self.lists = SharedPrefixes(
            prefixes=self._buffer[_HEADER : self._tokens_at].view(max_rows, 2),
            query_tokens=self._buffer[self._tokens_at : self._tokens_at + max_rows],
            works=self._buffer[self._works_at :].view(works, 8),
            num_works=self._buffer[:1],
        )
        self._planned: tuple[Int32Array, Int32Array] | None = None  # rows and num_scheduled that `_shares` is about
        self._shares = False

    def forget(self) -> None:
        """Rows were freed or start anew: the next step is looked at, whatever rows it has."""
        self._planned = None

    def plan(self, step: Step, q_start: Int32Array, tokens: int) -> bool:
        """Whether single-token rows of the step read prefixes together. Enqueues the lists where they have changed.

        Before the step's tokens are counted as computed. `q_start` int32 [R] first token of each row, `tokens` of all rows. Only in
        steps whose products depend on the batch anyway: up to PARTS_ROWS tokens a row's bits are its own.
        """
        if tokens <= PARTS_ROWS or len(step.rows) < MIN_ROWS:
            return False
        if self._planned is None or not (
            same(step.rows, self._planned[0]) and same(step.num_scheduled, self._planned[1])
        ):
            self._planned = step.rows, step.num_scheduled
            self._shares = self._look(step, q_start)
        return self._shares

    def _look(self, step: Step, q_start: Int32Array) -> bool:
        single = np.flatnonzero(step.num_scheduled == 1)
        rows = step.rows[single]
        groups = shared_prefixes(self._rows.blocks, rows, self._rows.computed[rows], self._rows.block_size)
        if not groups:
            return False
        work = prefix_work(
            groups, rows, q_start[single], single, self._heads_per_group, self._kv_heads, self._tile_rows, self._first_slot
        )  # fmt: skip
        words = np.zeros(self._works_at + work.works.size, np.int32)
        words[0] = len(work.works)
        words[_HEADER : _HEADER + work.prefixes.size] = work.prefixes.reshape(-1)
        words[self._tokens_at : self._tokens_at + len(work.query_tokens)] = work.query_tokens
        words[self._works_at :] = work.works.reshape(-1)
        self._buffer[: len(words)].copy_(upload(words, self._device))
        return True
