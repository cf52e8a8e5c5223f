"""Grammars in simulated time: what worker/grammar/runner.py does with a thread, done at once; and what must come out."""

from __future__ import annotations

import functools
import json
import random

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from octavo.v1 import common_pb2

from service.grammar import Grammar
from service.guidance import compile_grammar, load_tokenizer
from tests.simulation.plan import MAX_MODEL_LEN, VOCABULARY
from worker.backends.mock import EOS_TOKEN_ID
from worker.backends.mock_assets import mock_assets
from worker.grammar.matcher import Ends, RowMatcher, allowed
from worker.grammar.rows import ConstrainedRow, ConstrainedRows
from worker.step import Int32Array, RowStatus, Step, StepOutput

WORDS = -(-VOCABULARY // 32)


@functools.cache
def tokenizer() -> LLTokenizer:
    """Of the mock model."""
    return load_tokenizer(mock_assets(VOCABULARY, MAX_MODEL_LEN)["tokenizer.json"], VOCABULARY, (EOS_TOKEN_ID,))


@functools.cache
def start_of(grammar: Grammar) -> LLMatcher:
    """Compiled once for all runs."""
    return compile_grammar(grammar, tokenizer())


def mask_of(matcher: RowMatcher) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """What may come next, bool [vocab]."""
    return allowed(_bits(matcher), VOCABULARY)


def _bits(matcher: RowMatcher) -> Int32Array:
    bits = np.zeros(WORDS, np.int32)
    matcher.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    matcher.finish_mask(bits)
    return bits


class Masks:
    """Of one step; see worker.backend.Masks."""

    def __init__(self, places: Int32Array, rows: list[ConstrainedRow], late: list[bool], bits: Int32Array) -> None:
        self.places = places
        self.rows = rows
        self.late = late
        self._bits = bits

    def wait(self) -> Int32Array:
        return self._bits

    def took(self, output: StepOutput) -> None:
        """The matchers move on; who was late is told so."""
        tokens = np.full(output.num_tokens.size, -1)
        tokens[output.row_status == RowStatus.OK] = output.token_ids
        for place, row, late in zip(self.places.tolist(), self.rows, self.late, strict=True):
            if late:
                output.row_status[place] = RowStatus.MASK_LATE
            elif row.matcher is not None and tokens[place] >= 0:
                row.matcher.advance(int(tokens[place]))


class Grammars:
    """The constrained rows of one worker. Now and then a grammar is not compiled in time."""

    def __init__(self, rng: random.Random) -> None:
        self._rows = ConstrainedRows((EOS_TOKEN_ID,))
        self._rng = rng

    def begin(self, step: Step) -> Masks | None:
        places, rows = self._rows.apply(step)
        if not rows:
            return None
        bits = np.zeros((len(rows), WORDS), np.int32)
        for at, row in enumerate(rows):
            if row.matcher is None and not row.late:
                row.late = self._rng.random() < 0.2
                row.matcher = RowMatcher(start_of(row.grammar), row.ends, row.outputs)
            if not row.late and row.matcher is not None:
                bits[at] = _bits(row.matcher)
        return Masks(places, rows, [row.late for row in rows], bits)

    def reset(self) -> None:
        self._rows.reset()


def ends_of(min_tokens: int) -> Ends:
    """Of a simulated request."""
    return Ends(min_tokens, (EOS_TOKEN_ID,), ())


def message_of(grammar: Grammar) -> common_pb2.Grammar:
    """As a client sends it."""
    if grammar.kind == "choice":
        return common_pb2.Grammar(choice=common_pb2.Choices(values=json.loads(grammar.text)))
    return common_pb2.Grammar(**{grammar.kind: grammar.text})
