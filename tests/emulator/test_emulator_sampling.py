"""Row state and sampling without a GPU: the checks of tests/gpu against worker/sampling, on small vocabularies."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from kernels.shapes import truncated_shared_bytes
from tests.emulator.compile import Builder
from tests.emulator.library import EmulatedOps
from tests.gpu.gpu_harness import make_shape, makers
from tests.gpu.sampling_rows import PARAMS, Sampling, make_rows
from tests.gpu.test_gpu_sampling import (
    check_logprobs,
    check_nan_and_infinity,
    check_overflow,
    check_penalties,
    check_prepare,
    check_sampling,
)
from tests.gpu.test_gpu_truncation import check_edges, check_masses, check_places, check_truncation, hard_logits

SAMPLING = ("row_state", "process_logits", "sample")


def rows_for(builder: Builder, vocab: int, max_rows: int, clusters: bool = False) -> Sampling:
    ahead = (*SAMPLING, "truncated_sample-cluster" if clusters else "truncated_sample")
    return make_rows(vocab, max_rows, EmulatedOps(builder, make_shape(), ahead, clusters=clusters), "cpu")


def test_prepare_looks_up_what_the_plan_said(builder: Builder) -> None:
    check_prepare(rows_for(builder, 1000, 8), "cpu")


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("vocab", [1000, 5003])
def test_sampling_equals_the_reference(builder: Builder, vocab: int, clusters: bool) -> None:
    check_sampling(rows_for(builder, vocab, len(PARAMS) + 2, clusters), vocab, 4, "cpu")


@pytest.mark.parametrize("clusters", [False, True])
def test_nan_and_infinity_fail_their_row_alone(builder: Builder, clusters: bool) -> None:
    check_nan_and_infinity(rows_for(builder, 5000, 12, clusters), "cpu")


@pytest.mark.parametrize("clusters", [False, True])
def test_logits_that_penalties_make_infinite_fail_their_row(builder: Builder, clusters: bool) -> None:
    check_overflow(rows_for(builder, 1000, 2, clusters), "cpu")


def test_penalties_count_what_is_sampled(builder: Builder) -> None:
    check_penalties(rows_for(builder, 100, 2), "cpu")


def test_logprobs_describe_raw_logits(builder: Builder) -> None:
    check_logprobs(rows_for(builder, 2001, 4), 2001, "cpu")


@pytest.mark.parametrize("vocab", [1, 3, 33, 1003])
def test_a_token_is_chosen_wherever_it_stands(builder: Builder, vocab: int) -> None:
    each = -(-vocab // 32) * 4  # of a block of a cluster
    edges = {min(vocab - 1, part * each + more) for part in range(8) for more in (-1, 0, 4)} - {-1}
    check_places(rows_for(builder, vocab, len(edges), clusters=True), vocab, sorted(edges), "cpu")


@pytest.mark.parametrize("held", [False, True])
def test_rows_that_no_cluster_can_hold(builder: Builder, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And longer ones that it holds: each block copies in several groups."""
    if not held:
        few = truncated_shared_bytes(1, True)[0]
        monkeypatch.setattr("kernels.ops.truncated_shared_bytes", lambda vocab, roomy: (few, False))
    check_places(rows_for(builder, 40_003, 3, clusters=True), 40_003, [4999, 20_016, 40_002], "cpu")
    check_truncation(lambda vocab, rows: rows_for(builder, vocab, rows, True), "normal", 6001, 1, "cpu", large=3000)


@pytest.mark.parametrize("clusters", [False, True])
def test_top_p_knows_the_mass_of_all_tokens(builder: Builder, clusters: bool) -> None:
    check_masses(lambda vocab, rows: rows_for(builder, vocab, rows, clusters), 6001, "cpu")


def test_truncation_beyond_the_list_of_a_block(builder: Builder) -> None:
    check_truncation(lambda vocab, rows: rows_for(builder, vocab, rows), "flat", 20_011, 1, "cpu", large=15_000)


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("kind", hard_logits(8))
def test_truncation_of_hard_distributions(builder: Builder, kind: str, clusters: bool) -> None:
    """With more tokens than the kernel's lists hold."""
    check_truncation(lambda vocab, rows: rows_for(builder, vocab, rows, clusters), kind, 6001, 2, "cpu", large=3000)


@pytest.mark.parametrize("clusters", [False, True])
def test_a_draw_at_the_edge_of_what_is_kept(builder: Builder, clusters: bool) -> None:
    check_edges(lambda vocab, rows: rows_for(builder, vocab, rows, clusters), 6001, (2, 5, 11, 40), "cpu")


def test_words_are_copied(builder: Builder) -> None:
    _, ints, _ = makers("cpu")
    source = ints(list(range(700)))
    to = ints([-1] * 700)
    EmulatedOps(builder, make_shape()).copy_words(to, source)
    assert torch.equal(to, source)
