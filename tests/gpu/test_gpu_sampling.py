"""Row state and sampling on the device against worker/sampling, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from kernels.operands import StepTensors
from kernels.ops import KernelOps
from kernels.row_layout import PENALTIES
from tests.gpu.gpu_harness import ints, make_ops, make_shape, makers
from worker.backends.cuda_rows import DeviceRows, sampling_flags
from worker.backends.cuda_sampler import CudaSampler
from worker.sampling.sampler import RowContext
from worker.sampling.sampler import sample as reference_sample
from worker.step import NewRow, RowStatus, SamplingParams, Step

pytestmark = pytest.mark.gpu

NONE = np.zeros(0, np.int32)
LENGTH = 256


def new_step(new: list[NewRow]) -> Step:
    return Step(0, NONE, tuple(new), NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE)


Sampling = tuple[KernelOps, DeviceRows, CudaSampler]


def make_rows(vocab: int, max_rows: int, ops: KernelOps | None = None, device: str = "cuda") -> Sampling:
    """Rows and a sampler of the given operations, or of a GPU's."""
    ops = make_ops(make_shape()) if ops is None else ops
    rows = DeviceRows(ops, max_rows, LENGTH, 16, vocab, torch.device(device))
    return ops, rows, CudaSampler(ops, rows, max_rows, vocab, torch.device(device))


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


PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.3),
    "top_k": SamplingParams(temperature=0.8, top_k=7),
    "top_k 1": SamplingParams(temperature=0.8, top_k=1),
    "top_p": SamplingParams(temperature=1.2, top_p=0.8),
    "top_p small": SamplingParams(temperature=1.0, top_p=0.01),
    "min_p": SamplingParams(temperature=1.0, min_p=0.1),
    "all": SamplingParams(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01),
    "penalties": SamplingParams(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    "greedy penalties": SamplingParams(temperature=0, repetition_penalty=1.7, frequency_penalty=1.0),
    "bias": SamplingParams(temperature=0, logit_bias={3: 50.0, 999: 49.0, 5: -100.0}),
    "one bias": SamplingParams(temperature=0, logit_bias={999: 50.0}),
    "allowed": SamplingParams(temperature=1.0, allowed_token_ids=(1, 40, 41, 700, 999)),
    "min_tokens": SamplingParams(temperature=0, min_tokens=100, stop_token_ids=tuple(range(0, 1000, 2))),
    "bad words": SamplingParams(
        temperature=0, bad_words=((17,), (9, 8, 7), (4, 5)), logit_bias={7: 60.0, 17: 61.0, 5: 59.0}
    ),
    "empty": SamplingParams(temperature=0, allowed_token_ids=(4,), bad_words=((4,),)),
}


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


def hard_logits(vocab: int) -> dict[str, torch.Tensor]:
    """Distributions for which a histogram of equal steps is the wrong tool, and some that fill or overflow its lists."""
    plain = torch.randn(vocab, generator=torch.Generator().manual_seed(7))
    outlier, floor, masked, two = (plain.clone() for _ in range(4))
    outlier[vocab // 2] = 1e4  # all the others share a bin
    floor[::2] = -1e30
    masked[torch.arange(vocab) % 97 != 5] = -torch.inf
    two[::3] += 40  # nothing in between
    return {
        "normal": plain * 3,
        "flat": plain * 1e-3,
        "narrow": plain * 1e-6 + 20,
        "outlier": outlier,
        "floor": floor,
        "masked": masked,
        "two hills": two,
        "steps": (plain * 4).round(),
        "equal": torch.full((vocab,), 3.0),
        "subnormal": plain * 1e-42,
    }


def check_edges(make: Callable[[int, int], Sampling], vocab: int, most: Sequence[int], device: str) -> None:
    """Of each top_k of `most` rows whose draw is the last token that is kept, or would be the first one that is not.

    make(vocab, rows). Hot rows draw from all kept tokens alike, so one seed in top_k is such a row.
    """
    plain = torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    # A handful of the kernel's bins hold the 60 best.
    logits = torch.where(torch.arange(vocab) % (vocab // 60) == 0, 0.01 * plain, plain - 10)
    order = logits.argsort(descending=True).tolist()
    known, seeds = np.arange(10, dtype=np.int32), range(8 * max(most))
    chosen: list[tuple[SamplingParams, int, int]] = []  # row by row: parameters, seed, expected token

    def draws(top_k: int) -> list[int]:
        params = SamplingParams(temperature=1000.0, top_k=top_k)
        contexts: list[RowContext | None] = [RowContext(params, seed, known, 10) for seed in seeds]
        return list(map(int, reference_sample(logits.expand(len(seeds), vocab), contexts)[0]))

    for top_k in most:
        kept, more, params = draws(top_k), draws(top_k + 1), SamplingParams(temperature=1000.0, top_k=top_k)
        last = [seed for seed in seeds if kept[seed] == order[top_k - 1]][:3]
        beyond = [seed for seed in seeds if more[seed] == order[top_k]][:3]
        assert last and beyond
        chosen += [(params, seed, kept[seed]) for seed in last + beyond]
    _, rows, sampler = make(vocab, len(chosen))
    blocks = np.array([0], np.int32)
    rows.apply(
        new_step([NewRow(row, known, 10, 10, blocks, seed, params) for row, (params, seed, _) in enumerate(chosen)])
    )
    sampler.logits[: len(chosen), :vocab] = logits.to(device)
    sampler.sample(ints(list(range(len(chosen))), device), len(chosen), False, True)
    tokens = sampler.result[0, : len(chosen)].tolist()
    assert tokens == [token for _, _, token in chosen], [params.top_k for params, _, _ in chosen]


@pytest.mark.parametrize("vocab", [6001, 20_011])
def test_a_draw_at_the_edge_of_what_is_kept(vocab: int) -> None:
    check_edges(make_rows, vocab, (2, 5, 40), "cuda")


def check_masses(make: Callable[[int, int], Sampling], vocab: int, device: str) -> None:
    """top_p among tokens of masses 1, 1/2, 1/4, 1/8 and others that weigh some 1 together: as many are kept as the sum asks for."""
    masses = torch.rand(vocab, generator=torch.Generator().manual_seed(vocab), dtype=torch.float64).add(0.5) / vocab
    order = [vocab - 1, 0, vocab // 2, vocab // 3]
    masses[order] = torch.tensor([1, 0.5, 0.25, 0.125], dtype=torch.float64)
    logits, total = masses.log().float(), float(masses.sum())
    known, blocks, seeds = np.arange(10, dtype=np.int32), np.array([0], np.int32), range(16)
    params, expected = [], []
    for kept in range(1, 5):
        edge = (2 - 0.5 ** (kept - 1) - 0.5**kept) / total  # in the middle of the last one's mass
        params.append(SamplingParams(temperature=1.0, top_p=edge))
        contexts: list[RowContext | None] = [RowContext(params[-1], seed, known, 10) for seed in seeds]
        expected += map(int, reference_sample(logits.expand(len(seeds), vocab), contexts)[0])
        assert set(expected[-len(seeds) :]) == set(order[:kept])
    _, rows, sampler = make(vocab, len(expected))
    cases = [(one, seed) for one in params for seed in seeds]
    rows.apply(new_step([NewRow(row, known, 10, 10, blocks, seed, one) for row, (one, seed) in enumerate(cases)]))
    sampler.logits[: len(cases), :vocab] = logits.to(device)
    sampler.sample(ints(list(range(len(cases))), device), len(cases), False, True)
    assert sampler.result[0, : len(cases)].tolist() == expected


@pytest.mark.parametrize("vocab", [6001, 128_256])
def test_top_p_knows_the_mass_of_all_tokens(vocab: int) -> None:
    check_masses(make_rows, vocab, "cuda")


def check_places(made: Sampling, vocab: int, places: Sequence[int], device: str) -> None:
    """For as many rows as there are places, each of which is one row's best token: it is chosen, wherever blocks divide the row."""
    params = [SamplingParams(temperature=1.0, top_k=1), SamplingParams(temperature=1.0, top_p=0.1)]
    _, rows, sampler = made
    known, blocks = np.zeros(1, np.int32), np.array([0], np.int32)
    rows.apply(new_step([NewRow(row, known, 1, 1, blocks, row, params[row % 2]) for row in range(len(places))]))
    logits = torch.randn(len(places), vocab, generator=torch.Generator().manual_seed(vocab))
    logits[range(len(places)), list(places)] = 30.0
    sampler.logits[: len(places), :vocab] = logits.to(device)
    sampler.sample(ints(list(range(len(places))), device), len(places), False, True)
    assert sampler.result[:, : len(places)].tolist() == [list(places), [0] * len(places)]


@pytest.mark.parametrize("vocab", [3, 1003, 128_256, 1_300_001])
def test_a_token_is_chosen_wherever_it_stands(vocab: int) -> None:
    """Up to a vocabulary whose slices no block can hold."""
    near = {part * vocab // 8 + more for part in range(9) for more in (-4, -1, 0, 1, 3)}
    places = sorted({min(vocab - 1, max(0, place)) for place in near})
    check_places(make_rows(vocab, len(places)), vocab, places, "cuda")


def check_truncation(
    make: Callable[[int, int], Sampling], kind: str, vocab: int, trials: int, device: str, large: int = 6000
) -> None:
    """make(vocab, rows): for as many rows as there are trials and settings. `large`: a top_k beyond the kernel's lists."""
    ties = kind in ("steps", "equal", "subnormal", "narrow")  # top_p keeps ties at its edge, the reference does not
    params = [
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=0.7, top_k=40),
        SamplingParams(temperature=2.0, top_k=large),
        SamplingParams(temperature=1.0, top_k=vocab - 1),
        SamplingParams(temperature=1.0, min_p=0.3),
        *(
            []
            if ties
            else [
                SamplingParams(temperature=1.0, top_p=0.9),
                SamplingParams(temperature=1.0, top_p=0.01),
                SamplingParams(temperature=0.05, top_p=0.999),
                SamplingParams(temperature=1.5, top_k=large // 2, top_p=0.5),
                SamplingParams(temperature=1.0, top_k=200, top_p=0.95, min_p=0.001),
            ]
        ),
    ]
    count = len(params) * trials
    _, rows, sampler = make(vocab, count)
    known = np.arange(10, dtype=np.int32)
    chosen = [params[row % len(params)] for row in range(count)]
    rows.apply(
        new_step([NewRow(row, known, 10, 10, np.array([0], np.int32), row, chosen[row]) for row in range(count)])
    )
    logits = hard_logits(vocab)[kind].expand(count, vocab).contiguous()
    sampler.logits[:count, :vocab] = logits.to(device)
    sampler.sample(ints(list(range(count)), device), count, False, True)
    tokens, status = sampler.result[:, :count].cpu().numpy()
    expected, _ = reference_sample(logits, [RowContext(chosen[row], row, known, 10) for row in range(count)])
    assert not status.any()
    wrong = [
        (chosen[row], int(tokens[row]), int(expected[row])) for row in range(count) if tokens[row] != expected[row]
    ]
    # The reference works in float64: a near-tie, or a token at the very edge of top_p, may fall the other way.
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("kind", hard_logits(8))
def test_truncation_of_hard_distributions(kind: str) -> None:
    check_truncation(make_rows, kind, 50_257, 12, "cuda")
