"""One token for each sampling row of a step.

Rows that only want the best token take one argmax together. Every other row is treated alone, so its token cannot depend
on its neighbours, and a row that fails takes none of them with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from worker.backend import Masks
from worker.grammar.matcher import allowed
from worker.sampling.philox import gumbel
from worker.sampling.processors import apply_masks, apply_penalties, survivors
from worker.step import Int32Array, RowStatus, SamplingParams


@dataclass(frozen=True, slots=True)
class RowContext:
    """What the choice of a row's next token depends on besides its logits."""

    params: SamplingParams
    seed: int
    known: Int32Array  # prompt and outputs
    num_prompt: int

    @property
    def num_outputs(self) -> int:
        """Outputs so far: the index of the token to choose."""
        return len(self.known) - self.num_prompt


def is_plain_greedy(params: SamplingParams) -> bool:
    """Whether the best raw logit is always this row's token."""
    return (
        params.temperature == 0
        and not params.logit_bias
        and not params.allowed_token_ids
        and not params.bad_words
        and (params.min_tokens == 0 or not params.stop_token_ids)
        and params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
    )


def sample(
    logits: torch.Tensor, contexts: list[RowContext | None], masks: Masks | None = None
) -> tuple[Int32Array, Int32Array]:
    """Token ids and RowStatus, each int32 [n], for raw logits float32 [n, vocab].

    A context of None stands for a plain greedy row. The logits are left as they were. A token id means nothing where the status
    is not OK. Rows with a mask come last: the others are done while it is made.
    """
    best = logits.max(dim=-1)  # NaN wins a max, so one look at the value finds a bad row
    tokens = best.indices.to(torch.int32).numpy()
    status = np.where(best.values.isfinite().numpy(), np.int32(RowStatus.OK), np.int32(RowStatus.NAN))
    places = [] if masks is None else masks.places.tolist()
    constrained = set(places)
    for i, context in enumerate(contexts):
        if context is not None and status[i] == RowStatus.OK and i not in constrained:
            _place(_sample_row(logits[i].clone(), context), i, tokens, status)
    if masks is not None:
        for i, bits in zip(places, masks.wait(), strict=True):
            if status[i] == RowStatus.OK:
                _place(_sample_masked(logits[i], bits, contexts[i]), i, tokens, status)
    return tokens, status


def _place(token: int | None, i: int, tokens: Int32Array, status: Int32Array) -> None:
    if token is None:
        status[i] = RowStatus.MASK_EMPTY
    else:
        tokens[i] = token


def _sample_masked(logits: torch.Tensor, bits: Int32Array, context: RowContext | None) -> int | None:
    """The token of a row under a grammar; its logits are copied where anything but the mask changes them."""
    ids = torch.from_numpy(np.flatnonzero(allowed(bits, len(logits))))
    if len(ids) == 0:
        return None
    if context is None:
        return int(ids[logits[ids].argmax()])
    masked = torch.full_like(logits, -math.inf)
    masked[ids] = logits[ids]
    return _sample_row(masked, context)


def _sample_row(logits: torch.Tensor, context: RowContext) -> int | None:
    params = context.params
    apply_masks(logits, params, context.known, context.num_outputs)
    apply_penalties(logits, params, context.known, context.num_prompt)
    best = logits.max(dim=-1)
    if float(best.values) == -math.inf:
        return None
    if params.temperature == 0:
        return int(best.indices)
    ids, scaled = survivors(logits, params)
    return int(ids[np.argmax(scaled + gumbel(context.seed, context.num_outputs, ids))])
