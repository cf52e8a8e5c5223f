"""Log-probabilities of raw logits, collected into the step's ragged columns."""

from __future__ import annotations

import numpy as np
import torch

from worker.step import Float32Array, Int32Array, LogprobColumns


class LogprobCollector:
    """Gathers described positions of one step."""

    def __init__(self) -> None:
        self._owner: list[int] = []
        self._position: list[int] = []
        self._rank: list[int] = []
        self._token_ids: list[Int32Array] = []
        self._logprobs: list[Float32Array] = []

    def add(self, owner: int, position: int, logits: torch.Tensor, token_id: int, num_best: int) -> None:
        """Describe `token_id` at `position` of the row rows[owner], given raw logits float32 [vocab]."""
        logprobs = logits - logits.logsumexp(0)
        best = torch.topk(logprobs, min(num_best, len(logprobs)))
        self._owner.append(owner)
        self._position.append(position)
        self._rank.append(int((logits > logits[token_id]).sum()) + 1)
        self._token_ids.append(np.concatenate(([token_id], best.indices.numpy())).astype(np.int32))
        self._logprobs.append(np.concatenate(([float(logprobs[token_id])], best.values.numpy())).astype(np.float32))

    def columns(self) -> LogprobColumns | None:
        """All that was added, or None if nothing was."""
        if not self._owner:
            return None
        return LogprobColumns(
            owner=np.array(self._owner, np.int32),
            position=np.array(self._position, np.int32),
            rank=np.array(self._rank, np.int32),
            num_entries=np.array([len(ids) for ids in self._token_ids], np.int32),
            token_ids=np.concatenate(self._token_ids),
            logprobs=np.concatenate(self._logprobs),
        )
