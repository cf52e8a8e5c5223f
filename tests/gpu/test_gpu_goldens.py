"""The default model on the GPU in bfloat16: against the float32 goldens, and against itself under other schedules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.golden_tests.test_goldens import GOLDEN, after_preemption, in_chunks_of_7, make_requests
from worker.backends.cuda_backend import CudaBackend
from worker.backends.cuda_settings import CudaSettings
from worker.offline import OfflineEngine, OfflineResult

pytestmark = pytest.mark.gpu

NEAR_TIE = 0.25  # of logits around 20, which bfloat16 arithmetic carries to about 1 %
LOGPROB_TOLERANCE = 0.15


@pytest.fixture(scope="module")
def engine(smollm2_dir: Path) -> Iterator[OfflineEngine]:
    backend = CudaBackend(smollm2_dir, CudaSettings(max_rows=32, max_model_len=2048, num_blocks=1024, poison=True))
    yield OfflineEngine(backend)
    backend.close()


def parting(left: list[int], right: list[int]) -> int | None:
    """Where two continuations part, if they do."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)


def test_continuations_part_from_the_goldens_only_at_near_ties(engine: OfflineEngine) -> None:
    results = engine.generate(make_requests(), max_rows=16)
    partings = []
    for case, result in zip(GOLDEN["cases"], results, strict=True):
        at = parting(case["output_token_ids"], result.token_ids)
        agreed = case["logprobs"][:at]
        assert [entry.logprob for entry in result.logprobs[: len(agreed)]] == pytest.approx(
            agreed, abs=LOGPROB_TOLERANCE
        )
        if at is None:
            assert len(result.token_ids) == len(case["output_token_ids"])
        else:
            partings.append({"at": at, "gap": case["top1_minus_top2"][at], "of": len(case["output_token_ids"])})
            assert case["top1_minus_top2"][at] < NEAR_TIE, case["prompt"]
    print(json.dumps({"cases": len(results), "partings": partings}))


def test_schedules_part_from_one_another_only_at_near_ties(engine: OfflineEngine) -> None:
    """Alone, in chunks, after preemption."""
    batched = engine.generate(make_requests(), max_rows=16)
    alone = [engine.generate([request])[0] for request in make_requests()]
    found = {}
    for name, other in (
        ("alone", alone),
        ("chunks of 7", in_chunks_of_7(engine)),
        ("preempted", after_preemption(engine, batched)),
    ):
        found[name] = [gap for a, b in zip(batched, other, strict=True) if (gap := gap_at_parting(a, b)) is not None]
        assert all(gap < NEAR_TIE for gap in found[name]), (name, found)
    print(json.dumps({"gaps where schedules part": found}))


def gap_at_parting(left: OfflineResult, right: OfflineResult) -> float | None:
    """Log-probability of the best token minus that of the second where two results part; None where they don't."""
    at = parting(left.token_ids, right.token_ids)
    if at is None:
        return None
    (_, first), (_, second), *_ = left.logprobs[at].best
    return first - second
