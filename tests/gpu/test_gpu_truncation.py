"""top_k, top_p and min_p on the device against worker/sampling: where their threshold is hard to find."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from tests.gpu.gpu_harness import ints
from tests.gpu.sampling_rows import Sampling, make_rows, new_step
from worker.sampling.sampler import RowContext
from worker.sampling.sampler import sample as reference_sample
from worker.step import NewRow, SamplingParams

pytestmark = pytest.mark.gpu


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
