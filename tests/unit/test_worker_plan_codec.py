"""Plans of the same rows are not checked anew: steps and refusals are what they would be."""

from __future__ import annotations

from collections import deque
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from octavo.v1 import common_pb2, scheduler_pb2, step_pb2

from scheduler.codec import encode_plan
from scheduler.core import Request, SamplingParams, Scheduler, Settings, StepPlan, StepResult, WorkerSpec
from service.columns import pack
from service.errors import OctavoError
from worker.backend import BackendInfo, KVGroup
from worker.plan_codec import RowBooks
from worker.step import Step

INFO = BackendInfo("mock", "n", "float32", 100, 64, 6, 64, (KVGroup(0, 4, 60, 1, None),))

SAMPLING = common_pb2.SamplingSpec(top_p=1.0, repetition_penalty=1.0)
SUBMIT = scheduler_pb2.Submit(sampling=SAMPLING)


def said(step: Step) -> list[Any]:
    values = [getattr(step, field.name) for field in fields(step)]
    return [
        value.tolist()
        if isinstance(value, np.ndarray)
        else [new.row for new in value]
        if isinstance(value, tuple)
        else value
        for value in values
    ]


class Doubting(RowBooks):
    """One that never knows a plan again."""

    def decode(self, plan: step_pb2.StepPlan) -> Step:
        self._last = None
        return super().decode(plan)


@pytest.mark.parametrize("seed", range(4))
def test_steps_are_those_of_books_that_check_everything(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    spec = WorkerSpec("m", b"d" * 32, 6, 24, 64, 4, 60, run_ahead=2)
    scheduler, books, doubting = Scheduler(Settings()), RowBooks(INFO), Doubting(INFO)
    scheduler.add_worker(1, spec)
    flying: deque[StepPlan] = deque()
    again: list[int] = []
    original = RowBooks._decode_again
    monkeypatch.setattr(RowBooks, "_decode_again", lambda *a: again.append(1) or original(*a))
    for step in range(300):
        if random.random() < 0.06:
            prompt = random.integers(0, 50, int(random.integers(1, 30)), np.int32)
            scheduler.submit(
                Request(1, step, "m", prompt, SamplingParams(int(random.integers(1, 40))), payload=SUBMIT), float(step)
            )
        while (plan := scheduler.plan(1, float(step))) is not None:
            flying.append(plan)
            assert said(books.decode(encode_plan(plan, 1))) == said(doubting.decode(encode_plan(plan, 1)))
            for column in ("_active", "_known", "_computed", "_blocks"):
                assert np.array_equal(getattr(books, column), getattr(doubting, column)), column
        if flying:
            plan = flying.popleft()
            count = int(plan.num_samples.sum())
            scheduler.apply(
                1, StepResult(plan.step_id, np.ones(count, np.uint8), np.full(count, 9, np.int32)), float(step)
            )
    assert len(again) > 50


def decoding(blocks: int, length: int) -> tuple[RowBooks, step_pb2.StepPlan]:
    """Books with one row of `length` known tokens, all but the last computed, and the plan that was decoded twice."""
    books = RowBooks(INFO)
    first = step_pb2.StepPlan(
        rows=pack([2], np.int32), num_scheduled=pack([length - 2], np.int32), num_samples=pack([1], np.uint8)
    )
    first.new_rows.add(
        row=2,
        token_ids=pack(np.arange(length - 2), np.int32),
        num_prompt_tokens=length - 2,
        block_ids=pack(np.arange(blocks), np.int32),
        sampling=SAMPLING,
    )
    books.decode(first)
    plan = step_pb2.StepPlan(
        rows=pack([2], np.int32), num_scheduled=pack([1], np.int32), num_samples=pack([1], np.uint8)
    )
    books.decode(plan)
    return books, plan


@pytest.mark.parametrize(
    ("blocks", "length", "more", "problem"),
    [
        (2, 9, {}, "behind its last block"),
        (16, 64, {}, "beyond the model's context"),
        (4, 9, {"append_rows": pack([3], np.int32), "append_block_ids": pack([1], np.int32)}, "holds no request"),
        (4, 9, {"append_rows": pack([2], np.int32), "append_block_ids": pack([60], np.int32)}, "outside"),
        (4, 9, {"append_block_ids": pack([1], np.int32)}, "elements where"),
        (4, 9, {"chunk_lens": pack([1], np.int32)}, "elements where"),
        (4, 9, {"chunk_rows": pack([2], np.int32), "chunk_lens": pack([1], np.int32)}, "elements where"),
        (4, 9, {"num_draft_tokens": pack([1], np.uint8)}, "not claimed"),
    ],
)
def test_a_lie_is_refused_in_the_third_plan_as_in_the_first(
    blocks: int, length: int, more: dict[str, bytes], problem: str
) -> None:
    books, plan = decoding(blocks, length)
    lie = step_pb2.StepPlan(**more)
    lie.MergeFrom(plan)
    with pytest.raises(OctavoError, match=problem):
        books.decode(lie)


def test_a_row_that_was_freed_is_not_known_again() -> None:
    books, plan = decoding(4, 9)
    books.decode(step_pb2.StepPlan(freed_rows=pack([2], np.int32)))
    with pytest.raises(OctavoError, match="holds no request"):
        books.decode(plan)
    books, plan = decoding(4, 9)
    books.reset()
    with pytest.raises(OctavoError, match="holds no request"):
        books.decode(plan)
