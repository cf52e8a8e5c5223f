"""Which positions of a step are described by log-probabilities.

The logits at a position describe the token that follows it. Within a chunk that token is known; the one after a chunk's last
position may come only with the next chunk. Until then the position's output waits beside the workspace, and is described with
that chunk.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.shapes import MAX_LOGPROBS
from worker.backends.cuda_model import CudaDecoder
from worker.backends.cuda_results import DescribedPositions
from worker.backends.cuda_rows import DeviceRows
from worker.backends.cuda_sampler import CudaSampler
from worker.step import Step


class PromptDescriber:
    """Owns the waiting outputs: (hidden, projected) by row. Only the launch thread uses it."""

    def __init__(self, rows: DeviceRows, decoder: CudaDecoder, sampler: CudaSampler, spare_at: int) -> None:
        self._rows = rows
        self._decoder = decoder
        self._sampler = sampler
        self._spare_at = spare_at  # places of the workspace from here on belong to this object
        self._waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def reset(self) -> None:
        self._waiting.clear()

    def forget(self, rows: list[int]) -> None:
        """These rows were freed or start anew."""
        for row in rows:
            self._waiting.pop(row, None)

    def describe(self, step: Step) -> list[DescribedPositions]:
        """The step's known tokens, for rows that want prompt log-probabilities. After `forward`, before the samples."""
        columns: list[tuple[int, int, int, int, int]] = []  # at, owner, row, position, wanted
        first = spare = 0
        for owner, (row, count) in enumerate(zip(step.rows.tolist(), step.num_scheduled.tolist(), strict=True)):
            params = self._rows.params[row]
            if params is not None and params.prompt_logprobs is not None:
                wanted = min(params.prompt_logprobs, MAX_LOGPROBS)
                start = int(self._rows.computed[row]) - count
                if row in self._waiting and start < self._rows.num_prompt[row]:
                    columns.append((self._restore(row, spare), owner, row, start, wanted))
                    spare += 1
                last = min(start + count - 1, int(self._rows.num_prompt[row]) - 1)
                columns += [(first + i - start - 1, owner, row, i, wanted) for i in range(start + 1, last + 1)]
                if start + count < self._rows.num_prompt[row]:
                    self._keep(row, first + count - 1)
            first += count
        if not columns:
            return []
        at, owners, rows, positions, counts = np.array(columns, np.int32).T.copy()
        return self._sampler.describe_prompt(self._decoder, at, owners, rows, positions, counts)

    def describe_samples(self, rows: np.ndarray, owners: np.ndarray) -> list[DescribedPositions]:
        """The tokens just committed, for rows that want their log-probabilities."""
        if not self._rows.describing:
            return []
        wanted = [params.logprobs if (params := self._rows.params[row]) is not None else None for row in rows.tolist()]
        samples = np.array([i for i, count in enumerate(wanted) if count is not None], np.int32)
        if not len(samples):
            return []
        best = np.array([min(wanted[i] or 0, MAX_LOGPROBS) for i in samples], np.int32)
        chosen = rows[samples].astype(np.int32)
        position = self._rows.computed[chosen].astype(np.int32)
        logits = self._sampler.logits
        return [self._sampler.describe(logits, owners[samples].astype(np.int32), chosen, position, best, samples, 0)]

    def _keep(self, row: int, at: int) -> None:
        space = self._decoder.workspace
        self._waiting[row] = (space.hidden[at].clone(), space.projected[at].clone())

    def _restore(self, row: int, spare: int) -> int:
        space, at = self._decoder.workspace, self._spare_at + spare
        hidden, projected = self._waiting.pop(row)
        space.hidden[at].copy_(hidden)
        space.projected[at].copy_(projected)
        return at
