"""Row state and sampling on the device against worker/sampling, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.operands import StepTensors
from kernels.row_layout import PENALTIES
from tests.gpu.gpu_harness import ints, makers
from tests.gpu.sampling_rows import NONE, PARAMS, Sampling, make_rows, new_step
from worker.backends.cuda_rows import sampling_flags
from worker.sampling.sampler import RowContext
from worker.sampling.sampler import sample as reference_sample
from worker.step import NewRow, RowStatus, SamplingParams, Step

pytestmark = pytest.mark.gpu


def check_prepare(made: Sampling, device: str) -> None:
    """For 8 rows and a vocabulary of 1000."""
    ops, rows, _ = made
    _, ints, _ = makers(device)
    generator = np.random.default_rng(0)
    ids = {row: generator.integers(0, 1000, 100).astype(np.int32) for row in (2, 5, 7)}
    blocks = {2: [9, 4, 7], 5: [3], 7: [8, 1, 2, 5]}
    new = [
        NewRow(row, ids[row][:length], 90, start, np.array(blocks[row], np.int32), 1, SamplingParams())
        for row, length, start in ((2, 40, 17), (5, 1, 0), (7, 50, 49))
    ]
    rows.apply(new_step(new))
    more = Step(
        1, NONE, (), np.array([5, 2, 5], np.int32), np.array([6, 11, 12], np.int32), np.array([5], np.int32),
        np.array([30], np.int32), ids[5][1:31], NONE, NONE, NONE,
    )  # fmt: skip
    rows.apply(more)
    counts = {2: 23, 5: 31, 7: 1}
    order = [7, 2, 5]
    starts = np.cumsum([0] + [counts[row] for row in order])
    step = StepTensors(
        ints([*order, 0, 0, 0]),
        ints([*(counts[row] for row in order), 0, 0, 0]),
        ints([*starts.tolist(), int(starts[-1]) + 1, int(starts[-1]) + 200]),
        ints([9] * 6),
        rows.block_table,
    )
    end = int(starts[-1])
    token_ids, positions, slots = (ints([-9] * (end + 300)) for _ in range(3))
    ops.prepare_tokens(step, 6, end + 250, rows.fields, rows.tokens, token_ids, positions, slots)
    tables = {**blocks, 5: [3, 6, 12], 2: [9, 4, 7, 11]}
    first = {2: 17, 5: 0, 7: 49}
    for i, row in enumerate(order):
        place = np.arange(first[row], first[row] + counts[row])
        part = slice(int(starts[i]), int(starts[i + 1]))
        assert token_ids[part].tolist() == ids[row][place].tolist()
        assert positions[part].tolist() == place.tolist()
        assert slots[part].tolist() == [tables[row][p // 16] * 16 + p % 16 for p in place]
        assert int(rows.fields[row, 0]) == int(step.context_lens[i]) == first[row] + counts[row]
    for column in (token_ids, positions, slots):  # of padding rows
        assert column[end:].tolist() == [-1] * 250 + [-9] * 50
    assert step.context_lens[3:].tolist() == [0, 0, 0]


def test_prepare_looks_up_what_the_plan_said() -> None:
    check_prepare(make_rows(1000, 8), "cuda")


def check_sampling(made: Sampling, vocab: int, trials: int, device: str) -> None:
    """For two rows more than there are PARAMS."""
    names = list(PARAMS)
    _, rows, sampler = made
    generator = np.random.default_rng(vocab)
    contexts: list[RowContext | None] = []
    new = []
    for row, name in enumerate(names):
        known = generator.integers(0, vocab, 60).astype(np.int32)
        known[-3:] = (4, 9, 8)  # "bad words" must match the ending (9, 8), not (4,)
        seed = int(generator.integers(0, 2**63))
        new.append(NewRow(row, known, 40, 60, np.arange(4, dtype=np.int32), seed, PARAMS[name]))
        contexts.append(RowContext(PARAMS[name], seed, known, 40))
    rows.apply(new_step(new))
    for row, entry in enumerate(new):
        if rows.flags[row] & PENALTIES:
            counts = np.bincount(entry.token_ids[40:], minlength=vocab).astype(np.uint32)
            counts[entry.token_ids[:40]] |= 1 << 31
            assert np.array_equal(rows.counts[row].cpu().numpy().view(np.uint32), counts)
    order = [*range(len(names))][::-1]
    sample_rows = ints([*order, -1], device)
    wrong = []
    for trial in range(trials):
        logits = torch.randn((len(names), vocab), generator=torch.Generator().manual_seed(trial)) * (1 + trial % 4 * 2)
        sampler.logits[: len(order), :vocab] = logits.to(device)
        rows.fields[:, 0] = 60  # the row has not moved on
        before = rows.counts.clone()
        sampler.sample(sample_rows, len(order) + 1, True, True)
        tokens, status = sampler.result[:, : len(order)].cpu().numpy()
        expected, expected_status = reference_sample(logits, [contexts[row] for row in order])
        assert status.tolist() == expected_status.tolist()
        wrong += [
            (trial, names[row], int(tokens[i]), int(expected[i]))
            for i, row in enumerate(order)
            if expected_status[i] == RowStatus.OK and tokens[i] != expected[i]
        ]
        assert [int(rows.tokens[row, 60]) for row in order] == tokens.tolist()
        rows.counts.copy_(before)
    # The reference adds its noise in float64: a near-tie may fall the other way, once in thousands of draws.
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("vocab", [1000, 50_257, 128_256])
def test_sampling_equals_the_reference(vocab: int) -> None:
    check_sampling(make_rows(vocab, len(PARAMS) + 2), vocab, 20, "cuda")


def check_nan_and_infinity(made: Sampling, device: str) -> None:
    """For 12 rows and a vocabulary of 5000."""
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1, top_k=5),
        SamplingParams(temperature=1, presence_penalty=1),
    ]
    _, rows, sampler = made
    known = np.arange(10, dtype=np.int32)
    rows.apply(new_step([NewRow(row, known, 10, 10, np.array([0], np.int32), 1, params[row % 3]) for row in range(12)]))
    sampler.logits[:, :5000] = torch.randn(12, 5000, device=device)
    sampler.logits[0:3, 4321] = torch.nan
    sampler.logits[3:6, 17] = torch.inf
    sampler.logits[6:9] = -torch.inf
    for _ in range(2):  # the scratch must be as clean as before
        sampler.sample(ints(list(range(12)), device), 12, True, True)
        status = sampler.result[1, :12].tolist()
        assert status == [int(RowStatus.NAN)] * 9 + [int(RowStatus.OK)] * 3
        assert not sampler._raw_state.any() and not sampler._arrived.any()


def test_nan_and_infinity_fail_their_row_alone() -> None:
    check_nan_and_infinity(make_rows(5000, 12), "cuda")


def check_overflow(made: Sampling, device: str) -> None:
    """Penalties, such as no request may have, make finite logits infinite: who truncates fails, whatever the number of blocks."""
    params = [SamplingParams(top_p=0.9, repetition_penalty=1e-38), SamplingParams(top_k=5, repetition_penalty=1e-38)]
    _, rows, sampler = made
    known, block = np.arange(10, dtype=np.int32), np.array([0], np.int32)
    rows.apply(new_step([NewRow(row, known, 10, 10, block, 1, params[row]) for row in range(2)]))
    sampler.logits[:, :1000] = torch.rand(1000, generator=torch.Generator().manual_seed(1)).add(4).to(device)
    sampler.sample(ints([0, 1], device), 2, True, True)
    assert sampler.result[1, :2].tolist() == [int(RowStatus.NAN)] * 2


def test_logits_that_penalties_make_infinite_fail_their_row() -> None:
    check_overflow(make_rows(1000, 2), "cuda")


def check_penalties(made: Sampling, device: str) -> None:
    """For 2 rows and a vocabulary of 100."""
    params = SamplingParams(temperature=0, frequency_penalty=10.0)
    _, rows, sampler = made
    rows.apply(new_step([NewRow(1, np.zeros(1, np.int32), 1, 1, np.array([0], np.int32), 1, params)]))
    sampler.logits[0, :100] = torch.arange(100.0)
    got = []
    for _ in range(5):
        sampler.sample(ints([1], device), 1, True, False)
        got.append(int(sampler.result[0, 0]))
        rows.fields[1, 0] += 1
    assert got == [99, 98, 97, 96, 95]


def test_penalties_count_what_is_sampled() -> None:
    check_penalties(make_rows(100, 2), "cuda")


def test_flags_name_what_a_row_needs() -> None:
    assert [sampling_flags(PARAMS[name]) for name in ("greedy", "plain", "top_p", "penalties", "bias")] == [
        0,
        0,
        2,
        5,
        1,
    ]


def check_logprobs(made: Sampling, vocab: int, device: str) -> None:
    """For 4 rows."""
    _, rows, sampler = made
    known = np.array([7, 500, vocab - 1], np.int32)
    rows.apply(new_step([NewRow(2, known, 3, 3, np.array([0], np.int32), 1, SamplingParams(logprobs=20))]))
    logits = torch.randn(3, vocab) * 3
    sampler.logits[:3, :vocab] = logits.to(device)
    here, wanted = np.arange(3, dtype=np.int32), np.array([0, 5, 20], np.int32)
    described = sampler.describe(
        sampler.logits, here, np.full(3, 2, np.int32), here, wanted, np.full(3, -1, np.int32), 0
    )
    if device == "cuda":
        torch.cuda.synchronize()
    columns = described.columns(np.zeros(0, np.int32))
    assert columns is not None
    assert columns.num_entries.tolist() == [1, 6, 21]
    exact = logits.double().log_softmax(-1)
    at = 0
    for i in range(3):
        part = slice(at, at + int(columns.num_entries[i]))
        best = exact[i].topk(int(wanted[i]))
        assert columns.token_ids[part].tolist() == [int(known[i]), *best.indices.tolist()]
        expected = [float(exact[i, known[i]]), *best.values.tolist()]
        np.testing.assert_allclose(columns.logprobs[part], expected, atol=2e-5)
        assert columns.rank[i] == int((logits[i] > logits[i, known[i]]).sum()) + 1
        at = part.stop


def test_logprobs_describe_raw_logits() -> None:
    check_logprobs(make_rows(50_257, 4), 50_257, "cuda")
