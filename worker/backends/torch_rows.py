"""Row state: what a backend knows of each running request, in columns indexed by row.

Only a step writes here, in the order of steps. A row is free, or it belongs to one request until the step that frees it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from worker.backend import BackendError
from worker.sampling.sampler import RowContext, is_plain_greedy
from worker.step import Int32Array, NewRow, SamplingParams, Step


class RowState:
    """Token pool, counts, block tables and sampling parameters of all rows.

    The pool and the tables are allocated whole but never filled, so memory is used only where a row has been.
    """

    def __init__(self, max_rows: int, max_model_len: int, block_size: int) -> None:
        self._max_rows = max_rows
        self._max_model_len = max_model_len
        self._block_size = block_size
        self.max_blocks = -(-max_model_len // block_size)
        self._tokens = np.empty((max_rows, max_model_len), np.int32)
        self._blocks = np.empty((max_rows, self.max_blocks), np.int32)
        self.reset()

    def reset(self) -> None:
        """Forget every row."""
        self.num_known = np.zeros(self._max_rows, np.int64)
        self.num_computed = np.zeros(self._max_rows, np.int64)
        self.num_prompt = np.zeros(self._max_rows, np.int64)
        self.num_blocks = np.zeros(self._max_rows, np.int64)
        self.params: list[SamplingParams | None] = [None] * self._max_rows
        self._seeds = [0] * self._max_rows
        self._plain = np.zeros(self._max_rows, np.bool_)

    def apply(self, step: Step) -> None:
        """Freed rows, new rows, appended blocks, appended known tokens, in this order."""
        for row in step.freed_rows.tolist():
            self._free(row)
        for new in step.new_rows:
            self._start(new)
        for row, block in zip(step.append_rows.tolist(), step.append_block_ids.tolist(), strict=True):
            self._append_block(row, block)
        start = 0
        for row, length in zip(step.chunk_rows.tolist(), step.chunk_lens.tolist(), strict=True):
            self._append_tokens(row, step.chunk_token_ids[start : start + length])
            start += length
        self._check_scheduled(step)

    def tokens(self, row: int) -> Int32Array:
        """Known tokens of a row: prompt and outputs. A view."""
        return self._tokens[row, : self.num_known[row]]

    def blocks(self, row: int) -> Int32Array:
        """Block table of a row. A view."""
        return self._blocks[row, : self.num_blocks[row]]

    def gather_tokens(self, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Token ids at (rows[i], positions[i])."""
        return self._tokens[rows, positions].astype(np.int64)

    def gather_slots(self, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """KV cache slots of (rows[i], positions[i])."""
        blocks = self._blocks[rows, positions // self._block_size].astype(np.int64)
        return blocks * self._block_size + positions % self._block_size

    def push_sampled(self, rows: npt.NDArray[np.int64], token_ids: Int32Array) -> None:
        """A sampled token becomes the next known token of each of rows [n]."""
        self._tokens[rows, self.num_known[rows]] = token_ids
        self.num_known[rows] += 1

    def context(self, row: int) -> RowContext | None:
        """What sampling needs to know of a row, None for a plain greedy one."""
        params = self.params[row]
        if self._plain[row] or params is None:
            return None
        return RowContext(params, self._seeds[row], self.tokens(row), int(self.num_prompt[row]))

    def _free(self, row: int) -> None:
        self.num_known[row] = self.num_computed[row] = self.num_prompt[row] = self.num_blocks[row] = 0
        self.params[row] = None
        self._plain[row] = False

    def _start(self, new: NewRow) -> None:
        row = new.row
        self._free(row)
        self._append_tokens(row, new.token_ids)
        self.num_computed[row] = new.num_computed
        self.num_prompt[row] = new.num_prompt_tokens
        for block in new.block_ids.tolist():
            self._append_block(row, block)
        self.params[row] = params = new.sampling_after_mask
        self._seeds[row] = new.seed
        self._plain[row] = is_plain_greedy(params)

    def _append_block(self, row: int, block: int) -> None:
        count = self.num_blocks[row]
        if count >= self.max_blocks:
            raise BackendError(f"row {row}: its block table is full with {count} blocks")
        self._blocks[row, count] = block
        self.num_blocks[row] = count + 1

    def _append_tokens(self, row: int, token_ids: Int32Array) -> None:
        start = self.num_known[row]
        if start + len(token_ids) > self._max_model_len:
            raise BackendError(f"row {row}: {start + len(token_ids)} tokens exceed max_model_len {self._max_model_len}")
        self._tokens[row, start : start + len(token_ids)] = token_ids
        self.num_known[row] = start + len(token_ids)

    def _check_scheduled(self, step: Step) -> None:
        """A row computes only tokens that it knows, into blocks that it has."""
        ends = self.num_computed[step.rows] + step.num_scheduled
        unknown = ends > self.num_known[step.rows]
        if unknown.any():
            raise BackendError(f"row {int(step.rows[unknown.argmax()])}: more tokens are scheduled than the row knows")
        outside = ends > self.num_blocks[step.rows] * self._block_size
        if outside.any():
            raise BackendError(f"row {int(step.rows[outside.argmax()])}: its blocks do not hold the scheduled tokens")
