"""What one step asks of a backend and what it gives back.

These are the worker's own values, decoded from the columns of a `StepPlan` (worker/session.py checks every
column before it builds them) and encoded into a `StepResult`. Nothing here knows of gRPC, torch or CUDA, so the
engine also runs offline, as a library.

Rows. A request that runs lives in one *row* until it ends: its token ids, its computed count, its block table and
its sampling state stay with the backend, indexed by row. A step names rows and says how many tokens each of them
computes; it never repeats what the backend knows already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from service.grammar import Grammar

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


class RowStatus(IntEnum):
    """How one row of a step ended. Only this row's request is failed by a status other than OK."""

    OK = 0
    NAN = 1
    """The logits held NaN, or no finite value at all."""
    MASK_EMPTY = 2
    """Masks (allowed ids, bad words, min_tokens, a grammar) left no token to choose."""
    MASK_LATE = 3
    """The row's grammar was not compiled in time, or others have used up the lexer that it shares. The row has
    no token in this step and gets none until it is started again."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one row chooses its tokens. The router has validated the ranges; 0 temperature means greedy.

    Order of application (vLLM's): the grammar's mask; logit_bias, allowed ids, bad words, min_tokens; penalties; temperature; min_p;
    top_k; top_p; then Gumbel-max. Log-probabilities are of the raw logits, before any of it.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output tokens
    presence_penalty: float = 0.0  # over output tokens
    frequency_penalty: float = 0.0  # over output tokens
    min_tokens: int = 0  # no token of stop_token_ids is chosen before this many outputs
    stop_token_ids: tuple[int, ...] = ()  # every id that ends the request, EOS included
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token id sequences that must not be completed
    logprobs: int | None = None  # None: none wanted; 0: the chosen token's only; k: and the k best
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request that starts, or starts again, in a row.

    `token_ids`, int32 [num_computed + tokens scheduled in this step]: everything known up to the end of this step's chunk.
    Ids before `num_computed` have their keys and values in the blocks already (a prefix hit); they are here for penalties.
    Ids from `num_prompt_tokens` on are outputs of an earlier life of the request (preemption, migration, resume).
    """

    row: int
    token_ids: Int32Array
    num_prompt_tokens: int
    num_computed: int
    block_ids: Int32Array
    seed: int  # uint64
    sampling: SamplingParams
    grammar: Grammar | None = None

    @property
    def sampling_after_mask(self) -> SamplingParams:
        """How a token is chosen among those that the grammar's mask leaves, if there is one: min_tokens is in the mask then."""
        return self.sampling if self.grammar is None else replace(self.sampling, min_tokens=0)


@dataclass(frozen=True, slots=True)
class Step:
    """One step. Applied in this order: freed rows, new rows, appended blocks and tokens, forward, sample."""

    step_id: int
    freed_rows: Int32Array
    new_rows: tuple[NewRow, ...]
    append_rows: Int32Array  # [A]; block append_block_ids[i] becomes the next block of row append_rows[i]
    append_block_ids: Int32Array  # [A]
    chunk_rows: Int32Array  # [C]; rows that learn known tokens with this step ...
    chunk_lens: Int32Array  # [C]; ... how many ...
    chunk_token_ids: Int32Array  # [sum(chunk_lens)]; ... and which, appended to what the row knows
    rows: Int32Array  # [R] rows that compute
    num_scheduled: Int32Array  # [R] tokens each of them computes, at least 1
    num_samples: Int32Array  # [R] tokens each of them samples afterwards, 0 or 1


@dataclass(frozen=True, slots=True)
class LogprobColumns:
    """Ragged log-probabilities: P described positions with E entries in all.

    Each position opens with the token that stands there, then the best ones in falling order.
    """

    owner: Int32Array  # [P] index into the step's `rows`
    position: Int32Array  # [P] index of the described token in the row (prompt and outputs counted together)
    rank: Int32Array  # [P] rank of the token that stands there, 1 = the best
    num_entries: Int32Array  # [P]
    token_ids: Int32Array  # [E]
    logprobs: Float32Array  # [E] natural logarithm


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step made. The S sampling rows are those with num_samples > 0, in the step's order."""

    step_id: int
    num_tokens: Int32Array  # [S] tokens sampled; 0 where row_status is not OK
    row_status: Int32Array  # [S] RowStatus
    token_ids: Int32Array  # [sum(num_tokens)]
    logprobs: LogprobColumns | None
    device_ns: int  # time the device worked on this step
    gap_ns: int  # time the device was idle before it
