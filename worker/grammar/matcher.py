"""One row's grammar: the matcher, moved on by each token, and the mask of what may come next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher

from worker.step import Int32Array, SamplingParams


@dataclass(frozen=True, slots=True)
class Ends:
    """When a row may end before its grammar has to. Ids of stop tokens; counts are output tokens."""

    min_tokens: int
    stop_token_ids: tuple[int, ...]  # of the request, the model's among them unless it ignores these
    ignored: tuple[int, ...]  # of the model, where the request ignores them

    @classmethod
    def of(cls, params: SamplingParams, eos_token_ids: tuple[int, ...]) -> Ends:
        """What a request's parameters say, in a model with these end-of-sequence tokens."""
        ignored = tuple(token_id for token_id in eos_token_ids if token_id not in params.stop_token_ids)
        return cls(params.min_tokens, params.stop_token_ids, ignored)


class RowMatcher:
    """Where one row stands in its grammar. One thread at a time.

    Tokens that end the row too early are masked as long as anything else is allowed. Where nothing else is, the output is complete
    and ends: a grammar goes before min_tokens and ignore_eos.
    """

    def __init__(self, start: LLMatcher, ends: Ends, outputs: Sequence[int]) -> None:
        """`start` is a matcher at the grammar's beginning of which a copy is taken; `outputs` are those of an earlier life."""
        self.matcher = start.deep_copy()
        self._ends = ends
        self._num_outputs = len(outputs)
        if outputs:
            self.matcher.consume_tokens(list(outputs))

    @property
    def problem(self) -> str:
        """Why the row can't go on: tokens that the grammar does not allow, or work beyond llguidance's limits. Empty: it can."""
        return self.matcher.get_error()

    def advance(self, token_id: int) -> None:
        """A token was chosen."""
        self._num_outputs += 1
        self.matcher.consume_token(token_id)

    def finish_mask(self, bits: Int32Array) -> None:
        """Turn what the matcher has filled in, int32 [vocab / 32], into what the row may choose. All zero: it can't go on."""
        if self.matcher.is_error():  # llguidance then allows the end, which would pass for a complete output
            bits[:] = 0
            return
        too_early = self._ends.ignored
        if self._num_outputs < self._ends.min_tokens:
            too_early += self._ends.stop_token_ids
        if not too_early:
            return
        trimmed = bits.copy()
        for token_id in too_early:
            trimmed[token_id // 32] &= ~np.int32(0) ^ _BITS[token_id % 32]
        if trimmed.any():
            bits[:] = trimmed


_BITS = (np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.int32)


def allowed(bits: Int32Array, vocab_size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Packed masks int32 [..., vocab / 32], the lowest bit first, as bool [..., vocab]."""
    octets = np.unpackbits(bits.view(np.uint8), axis=-1, count=vocab_size, bitorder="little")
    return octets.view(np.bool_)
