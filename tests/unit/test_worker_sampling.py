"""Sampling: noise against published vectors, processors against transformers', draws against exact probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from worker.sampling.logprobs import LogprobCollector
from worker.sampling.philox import philox4x32, uniform
from worker.sampling.processors import apply_masks, apply_penalties, survivors
from worker.sampling.sampler import RowContext, is_plain_greedy, sample
from worker.step import RowStatus, SamplingParams

VOCAB = 64
KNOWN = np.array([3, 9, 9, 20, 7, 7, 7, 1], np.int32)
NUM_PROMPT = 3


def make_logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def context(params: SamplingParams, seed: int = 1, known: np.ndarray = KNOWN) -> RowContext:
    return RowContext(params, seed, known, NUM_PROMPT)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_random123s_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    words = philox4x32(np.array(counter, np.uint64)[:, None], (key[0], key[1]))
    assert [int(word) for word in words[:, 0]] == [int(word, 16) for word in expected.split()]


def test_noise_depends_on_seed_index_and_token_only() -> None:
    every = uniform(2**64 - 1, 5, np.arange(1000))
    some = np.array([999, 4, 501])
    assert np.array_equal(uniform(2**64 - 1, 5, some), every[some])
    assert len(np.unique(every)) == 1000
    assert ((every > 0) & (every < 1)).all()
    for other in (uniform(2**63 - 1, 5, np.arange(1000)), uniform(2**64 - 1, 6, np.arange(1000))):
        assert not (other == every).any()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=7),
        SamplingParams(temperature=0.9, top_p=0.8),
        SamplingParams(temperature=0.9, min_p=0.05),
        SamplingParams(temperature=1.2, min_p=0.02, top_k=12, top_p=0.9),
    ],
)
def test_survivors_are_those_of_transformers(params: SamplingParams) -> None:
    logits = make_logits()
    # min_p at temperature T after scaling, as vLLM and this engine do: transformers' warpers in the same order.
    expected = TemperatureLogitsWarper(params.temperature)(None, logits.clone())
    if params.min_p:
        expected = MinPLogitsWarper(params.min_p)(None, expected)
    if params.top_k:
        expected = TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1:
        expected = TopPLogitsWarper(params.top_p)(None, expected)
    ids, scaled = survivors(logits[0], params)
    order = np.argsort(ids)
    assert ids[order].tolist() == expected[0].isfinite().nonzero().squeeze(1).tolist()
    probabilities = np.exp(scaled[order]) / np.exp(scaled).sum()
    assert probabilities == pytest.approx(expected[0].softmax(0)[ids[order]].numpy(), rel=1e-4)


def test_top_p_beyond_the_first_look_sorts_everything() -> None:
    logits = torch.zeros(5000)
    logits[17] = 1.0
    ids, _ = survivors(logits, SamplingParams(top_p=0.5))
    total = 4999 + math.e
    assert len(ids) == 1 + math.ceil((0.5 * total - math.e) - 1e-6)
    assert 17 in ids


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = make_logits()
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.from_numpy(KNOWN.astype(np.int64))[None], logits.clone())
    apply_penalties(logits[0], SamplingParams(repetition_penalty=1.7), KNOWN, NUM_PROMPT)
    assert torch.equal(logits, expected)


def test_presence_and_frequency_count_outputs_only() -> None:
    before = make_logits()[0]
    logits = before.clone()
    apply_penalties(logits, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), KNOWN, NUM_PROMPT)
    expected = {20: 0.75, 7: 1.25, 1: 0.75}
    for token in range(VOCAB):
        assert float(before[token] - logits[token]) == pytest.approx(expected.get(token, 0.0), abs=1e-5)


def test_bad_words_are_those_of_transformers() -> None:
    words = [[5], [7, 1, 8], [1, 11], [7, 12], list(range(20))]
    logits = make_logits()
    expected = NoBadWordsLogitsProcessor(words, eos_token_id=63)(
        torch.from_numpy(KNOWN.astype(np.int64))[None], logits.clone()
    )
    apply_masks(logits[0], SamplingParams(bad_words=tuple(map(tuple, words))), KNOWN, 5)
    assert torch.equal(logits, expected)
    assert logits[0].isneginf().nonzero().squeeze(1).tolist() == [5, 8, 11]


def test_bias_allowed_ids_and_min_tokens() -> None:
    logits = torch.zeros(VOCAB)
    params = SamplingParams(logit_bias={4: 2.0, 5: 3.0}, allowed_token_ids=(4, 6, 2), min_tokens=6, stop_token_ids=(2,))
    apply_masks(logits, params, KNOWN, 5)
    assert {i: v for i, v in enumerate(logits.tolist()) if v != -math.inf} == {4: 2.0, 6: 0.0}
    logits = torch.zeros(VOCAB)
    apply_masks(logits, params, KNOWN, 6)
    assert logits.isfinite().nonzero().squeeze(1).tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_k=8),
        SamplingParams(temperature=1.5, top_p=0.7, repetition_penalty=1.2),
    ],
)
def test_draws_follow_the_probabilities(params: SamplingParams) -> None:
    """Chi-square over 4,000 seeds; the seeds are fixed, so the outcome is too.

    The bound is the 99.9 % quantile in Wilson and Hilferty's approximation.
    """
    vocab, draws = 16, 4000
    logits = make_logits(vocab=vocab, seed=3)
    known = np.array([3, 9, 9, 2, 7], np.int32)
    counts = np.zeros(vocab)
    for seed in range(draws):
        tokens, status = sample(logits, [context(params, seed * 0x9E3779B97F4A7C15 % 2**64, known)])
        assert status[0] == RowStatus.OK
        counts[tokens[0]] += 1
    edited = logits[0].clone()
    apply_penalties(edited, params, known, NUM_PROMPT)
    ids, scaled = survivors(edited, params)
    expected = np.zeros(vocab)
    expected[ids] = np.exp(scaled) / np.exp(scaled).sum() * draws
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    rare = (expected > 0) & ~common
    observed, wanted = np.append(counts[common], counts[rare].sum()), np.append(expected[common], expected[rare].sum())
    keep = wanted > 0
    statistic = float(((observed - wanted)[keep] ** 2 / wanted[keep]).sum())
    freedom = int(keep.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


def test_a_rows_token_does_not_depend_on_its_neighbours() -> None:
    logits = make_logits(rows=8)
    contexts = [context(SamplingParams(temperature=0.5 + 0.2 * i, top_p=0.9), seed=i) for i in range(8)]
    together, _ = sample(logits, list(contexts))
    alone = [int(sample(logits[i : i + 1], [contexts[i]])[0][0]) for i in range(8)]
    assert together.tolist() == alone


def test_a_bad_row_ends_alone() -> None:
    logits = make_logits(rows=6)
    before = logits.clone()
    logits[1, 5] = math.nan
    logits[2] = -math.inf
    logits[3, 5] = math.inf
    empty = SamplingParams(temperature=0.0, allowed_token_ids=(4,), bad_words=((4,),))
    contexts = [None, context(SamplingParams()), None, context(SamplingParams()), context(empty), None]
    tokens, status = sample(logits, contexts)
    assert status.tolist() == [
        RowStatus.OK,
        RowStatus.NAN,
        RowStatus.NAN,
        RowStatus.NAN,
        RowStatus.MASK_EMPTY,
        RowStatus.OK,
    ]
    assert tokens[[0, 5]].tolist() == before[[0, 5]].argmax(-1).tolist()


def test_masked_tokens_are_never_drawn_however_hot() -> None:
    logits = make_logits()
    logits[0, ::2] = -math.inf
    params = SamplingParams(temperature=1e6)
    drawn = {int(sample(logits, [context(params, seed)])[0][0]) for seed in range(200)}
    assert all(token % 2 for token in drawn)
    assert len(drawn) > 20


def test_greedy_with_penalties_is_not_plain() -> None:
    assert is_plain_greedy(SamplingParams(temperature=0.0, top_k=5, stop_token_ids=(1,), logprobs=3))
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.0, logit_bias={1: 1.0}),
        SamplingParams(temperature=0.0, min_tokens=1, stop_token_ids=(1,)),
        SamplingParams(temperature=0.0, repetition_penalty=1.1),
    ):
        assert not is_plain_greedy(params)
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 1.0
    tokens, _ = sample(logits, [context(SamplingParams(temperature=0.0, frequency_penalty=1.0))])
    assert tokens[0] == 0


def test_log_probabilities_are_of_the_raw_logits_with_ranks() -> None:
    logits = torch.tensor([1.0, 3.0, -math.inf, 2.0])
    collector = LogprobCollector()
    collector.add(owner=2, position=9, logits=logits, token_id=2, num_best=3)
    collector.add(owner=3, position=1, logits=logits, token_id=3, num_best=0)
    columns = collector.columns()
    assert columns is not None
    total = math.log(math.e + math.e**3 + math.e**2)
    assert columns.owner.tolist() == [2, 3]
    assert columns.position.tolist() == [9, 1]
    assert columns.rank.tolist() == [4, 2]
    assert columns.num_entries.tolist() == [4, 1]
    assert columns.token_ids.tolist() == [2, 1, 3, 0, 3]
    assert columns.logprobs[0] == -math.inf
    assert columns.logprobs[1:].tolist() == pytest.approx([3 - total, 2 - total, 1 - total, 2 - total], abs=1e-5)
    assert LogprobCollector().columns() is None
