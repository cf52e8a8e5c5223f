"""What changes a row's logits before a token is chosen, in vLLM's order: masks, penalties, temperature and truncation.

Each function works on one row of logits, float32 [vocab], in place. A forbidden token has -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from worker.step import Int32Array, SamplingParams

_NEVER = -math.inf
_TOP_P_FIRST_LOOK = 1024


def apply_masks(logits: torch.Tensor, params: SamplingParams, known: Int32Array, num_outputs: int) -> None:
    """logit_bias, allowed_token_ids, bad_words and min_tokens. `known` is prompt and outputs, int32 [n]."""
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        logits.index_add_(0, ids, torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype))
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids, dtype=torch.int64)
        kept = logits[allowed]
        logits.fill_(_NEVER)
        logits[allowed] = kept
    banned = [word[-1] for word in params.bad_words if word and _ends_with(known, word[:-1])]
    if num_outputs < params.min_tokens:
        banned.extend(params.stop_token_ids)
    if banned:
        logits[torch.tensor(banned, dtype=torch.int64)] = _NEVER


def _ends_with(known: Int32Array, ending: Sequence[int]) -> bool:
    return len(known) >= len(ending) and (not ending or known[-len(ending) :].tolist() == list(ending))


def apply_penalties(logits: torch.Tensor, params: SamplingParams, known: Int32Array, num_prompt: int) -> None:
    """Repetition (CTRL, arXiv:1909.05858) over prompt and outputs; presence and frequency (OpenAI's) over outputs."""
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(known).astype(np.int64))
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(known[num_prompt:], return_counts=True)
        amounts = params.presence_penalty + params.frequency_penalty * counts.astype(np.float32)
        logits[torch.from_numpy(ids.astype(np.int64))] -= torch.from_numpy(amounts.astype(np.float32))


def survivors(logits: torch.Tensor, params: SamplingParams) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that temperature, min_p, top_k and top_p leave: ids [n] and their scaled logits, the best at 0.

    At least one logit must be finite. Ties at the edge of top_k or min_p are kept; top_p keeps the smallest set of best tokens whose
    probability reaches it.
    """
    threshold = float("-inf")
    best = logits.max()
    if params.min_p > 0:
        threshold = float(best) + math.log(params.min_p) * params.temperature
    if 0 < params.top_k < logits.shape[0]:
        threshold = max(threshold, float(torch.topk(logits, params.top_k).values[-1]))
    kept = (logits >= threshold) & (logits > _NEVER)
    ids = kept.nonzero().squeeze(1)
    scaled = (logits[ids].double() - best.double()) / params.temperature
    if params.top_p < 1:
        nucleus = _nucleus(scaled, params.top_p)
        ids, scaled = ids[nucleus], scaled[nucleus]
    return ids.numpy(), scaled.numpy()


def _nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """Places of the best tokens whose probabilities reach top_p. Sorts only as many as it must look at."""
    total = scaled.logsumexp(0)
    size = min(_TOP_P_FIRST_LOOK, len(scaled))
    while True:
        best = torch.topk(scaled, size)
        reached = (best.values - total).exp().cumsum(0)
        if size == len(scaled) or float(reached[-1]) >= top_p:
            count = int((reached < top_p).sum()) + 1
            return best.indices[:count]
        size = len(scaled)
