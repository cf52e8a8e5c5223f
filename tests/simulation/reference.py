"""What a request's output would be if nothing ever happened: the mock model, computed from its definition."""

from __future__ import annotations

import functools

import numpy as np
from octavo.v1 import common_pb2

from router.assets import ModelAssets
from router.output import FinishRules, Output
from tests.simulation.grammars import ends_of, mask_of, start_of
from tests.simulation.plan import MAX_MODEL_LEN, VOCABULARY, RequestPlan
from worker.backends.mock import EOS_TOKEN_ID, masked_choice
from worker.backends.mock_assets import mock_assets
from worker.grammar.matcher import RowMatcher

EOS_EVERY = 60
_MASK = (1 << 64) - 1


@functools.cache
def assets() -> ModelAssets:
    """Tokenizer and token table of the mock model."""
    return ModelAssets.load(mock_assets(VOCABULARY, MAX_MODEL_LEN))


def _mix(value: int, salt: int) -> int:
    mixed = ((value + 0x9E3779B97F4A7C15) & _MASK) * 0xBF58476D1CE4E5B9 & _MASK
    mixed ^= (salt + 1) * 0x94D049BB133111EB & _MASK
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
    return mixed ^ mixed >> 31


def undisturbed(plan: RequestPlan, index: int, seed: int) -> Output:
    """Output `index` of a request, run to its end by itself."""
    output = Output(index, rules_of(plan), assets().table.detokenizer(True))
    prefix = sum(_mix(token, position) for position, token in enumerate(plan.prompt)) & _MASK
    length, count = len(plan.prompt), 0
    matcher = None
    if plan.grammar is not None:
        matcher = RowMatcher(start_of(plan.grammar), ends_of(plan.min_tokens), ())
    while not output.finish_reason:
        mixed = _mix(prefix ^ (seed if plan.temperature > 0 else 0), count)
        token = mixed % (VOCABULARY - 258) + 258
        if (mixed >> 32) % EOS_EVERY == 0 and count >= plan.min_tokens:
            token = EOS_TOKEN_ID
        if matcher is not None:
            token = masked_choice(np.uint64(mixed), mask_of(matcher))
            matcher.advance(token)
        output.append([token])
        prefix = (prefix + _mix(token, length)) & _MASK
        length, count = length + 1, count + 1
        if length >= MAX_MODEL_LEN:
            output.end(common_pb2.FINISH_REASON_LENGTH)
    return output


def rules_of(plan: RequestPlan) -> FinishRules:
    """When the router ends an output of this request."""
    from router.stop import StopStrings

    return FinishRules(
        max_tokens=plan.max_tokens,
        min_tokens=plan.min_tokens,
        stop_token_ids=frozenset({EOS_TOKEN_ID}),
        stops=StopStrings([plan.stop]) if plan.stop else None,
        under_grammar=plan.grammar is not None,
    )
