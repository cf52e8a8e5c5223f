"""Sampling on the device: which kernels a step's rows need, their tensors, and the description of positions (log-probabilities)."""

from __future__ import annotations

import numpy as np
import torch

from kernels.ops import KernelOps
from kernels.shapes import MAX_LOGPROBS, SAMPLE_PARTS
from worker.backends.cuda_model import CudaDecoder
from worker.backends.cuda_results import DescribedPositions
from worker.backends.cuda_rows import DeviceRows, upload
from worker.step import Int32Array

Tensor = torch.Tensor


class CudaSampler:
    """Logits and what becomes of them. Owns float32 [max_rows, vocab] twice: raw and processed."""

    def __init__(self, ops: KernelOps, rows: DeviceRows, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._ops = ops
        self._rows = rows
        self._vocab = vocab_size
        self._device = device
        self._max_rows = max_rows
        stride = row_stride(vocab_size)
        self.logits = torch.zeros((max_rows, stride), dtype=torch.float32, device=device)
        self._processed = torch.zeros_like(self.logits)

        def ints(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self._partial, self._raw_state, self._arrived = ints(max_rows, SAMPLE_PARTS, 2), ints(max_rows), ints(max_rows)
        self._chosen, self._status = ints(max_rows), ints(max_rows)
        self.result = ints(2, max_rows)

    @staticmethod
    def device_bytes(max_rows: int, vocab_size: int) -> int:
        """What the logits take."""
        return 8 * max_rows * row_stride(vocab_size)

    def sample(
        self, sample_rows: Tensor, count: int, processes: bool, truncates: bool, host: Tensor | None = None
    ) -> None:
        """Choose and commit a token for sample_rows int32 [count]; `processes`, `truncates`: some row needs that. Tokens and status
        go to `result`, and to the pinned memory whose address `host` holds (KernelOps.commit)."""
        ops, rows = self._ops, self._rows
        if processes:
            ops.process_logits(
                self.logits,
                self._vocab,
                sample_rows,
                count,
                rows.fields,
                rows.tokens,
                rows.counts,
                self._processed,
                self._raw_state,
            )
        scratch = (self._partial, self._raw_state, self._arrived)
        ops.choose(
            self.logits,
            self._processed,
            self._vocab,
            sample_rows,
            count,
            rows.fields,
            scratch,
            self._chosen,
            self._status,
        )
        if truncates:
            ops.choose_truncated(
                self.logits,
                self._processed,
                self._vocab,
                sample_rows,
                count,
                rows.fields,
                self._raw_state,
                self._chosen,
                self._status,
            )
        ops.commit(
            self._chosen, self._status, sample_rows, count, rows.fields, rows.tokens, rows.counts, self.result, host
        )

    def describe(
        self,
        logits: Tensor,
        owner: Int32Array,
        row: Int32Array,
        position: Int32Array,
        wanted: Int32Array,
        samples: Int32Array,
        first: int,
    ) -> DescribedPositions:
        """Log-probabilities at `position` [P] of permanent rows `row`, given logits rows first .. first + P - 1 (or samples)."""
        count = len(owner)
        source = np.where(samples >= 0, samples, first + np.arange(count)).astype(np.int32)
        jobs = upload(np.stack((source, row, position, wanted), axis=1).astype(np.int32), self._device)
        ids = torch.empty((count, MAX_LOGPROBS + 1), dtype=torch.int32, device=self._device)
        values = torch.empty((count, MAX_LOGPROBS + 1), dtype=torch.float32, device=self._device)
        ranks = torch.empty(count, dtype=torch.int32, device=self._device)
        self._ops.logprobs(logits, self._vocab, jobs, self._rows.tokens, ids, values, ranks)
        return DescribedPositions(owner, position, wanted, samples, _download(ids), _download(values), _download(ranks))

    def describe_prompt(
        self,
        decoder: CudaDecoder,
        at: Int32Array,
        owner: Int32Array,
        row: Int32Array,
        position: Int32Array,
        wanted: Int32Array,
    ) -> list[DescribedPositions]:
        """Log-probabilities of known tokens: those after the step's tokens `at` [P]. Goes through the logits a part at a time."""
        parts = []
        for first in range(0, len(at), self._max_rows):
            part = slice(first, first + self._max_rows)
            decoder.logits(upload(at[part], self._device), len(at[part]), self.logits)
            none = np.full(len(at[part]), -1, np.int32)
            parts.append(self.describe(self.logits, owner[part], row[part], position[part], wanted[part], none, 0))
        return parts


def row_stride(vocab_size: int) -> int:
    """Logits rows start on 16 bytes."""
    return -(-vocab_size // 4) * 4


def _download(tensor: Tensor) -> Tensor:
    # Pinned, or the copy would wait for the stream; in the emulator's tests there is no device to pin for.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=True)
    return host
