"""Steps of the scheduler core: what is planned, what a result does, and what a failed one leaves, one rule a test.

What holds for every schedule is in tests/property/test_scheduler_core.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scheduler.core import FinishReason, InvalidResult, Reason, RowStatus, StepResult
from tests.unit.core_steps import SPEC, answer, planned, request, scheduler_with, step

# Planning


def test_a_long_prefill_never_stalls_a_decode() -> None:
    scheduler = scheduler_with(replace(SPEC, num_blocks=64))
    scheduler.submit(request(1, num_prompt=4, max_tokens=20), 0.0)
    step(scheduler)
    scheduler.submit(request(2, num_prompt=50, priority=9), 0.0)
    shares = []
    while not shares or (len(shares[-1]) == 2 and shares[-1][1] > 1):
        plan = planned(scheduler)
        by_row = dict(zip(plan.rows.tolist(), plan.num_scheduled.tolist(), strict=True))
        shares.append([by_row[row] for row in sorted(by_row)])
        scheduler.apply(1, answer(plan), 0.0)
    assert shares == [[1, 15], [1, 15], [1, 15], [1, 5], [1, 1]]


def test_a_step_that_several_share_is_short_and_a_prompt_alone_has_the_whole_budget() -> None:
    scheduler = scheduler_with(replace(SPEC, max_num_batched_tokens=32, run_ahead=4), max_shared_tokens=10)
    scheduler.submit(request(1, num_prompt=40), 0.0)
    alone = planned(scheduler)
    assert alone.num_scheduled.tolist() == [32]
    scheduler.submit(request(2, num_prompt=30), 0.0)
    scheduler.submit(request(3, num_prompt=5), 0.0)
    shared = [planned(scheduler).num_scheduled.tolist() for _ in range(3)]
    assert shared == [[8, 2], [1, 9], [1, 9]]
    many = scheduler_with(replace(SPEC, max_num_batched_tokens=32), max_shared_tokens=1)
    for handle in (1, 2, 3):
        many.submit(request(handle, num_prompt=20), 0.0)
    assert planned(many).num_scheduled.tolist() == [20], "who needs less than all is not joined beyond the bound"
    assert planned(many).num_scheduled.tolist() == [1, 7], (
        "twice the rows at least: decodes leave something for prompts"
    )


def test_known_tokens_travel_with_the_chunk_that_needs_them() -> None:
    scheduler = scheduler_with(SPEC)
    scheduler.submit(request(1, prompt=np.arange(37), max_tokens=2), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    assert first.new_rows[0].token_ids.tolist() == list(range(16))
    assert first.num_samples.tolist() == [0]
    assert (second.chunk_rows.tolist(), second.chunk_lens.tolist()) == (first.rows.tolist(), [16])
    assert second.chunk_token_ids.tolist() == list(range(16, 32))
    scheduler.apply(1, answer(first), 0.0)
    third = planned(scheduler)
    assert third.chunk_token_ids.tolist() == list(range(32, 37))
    assert third.num_samples.tolist() == [1]
    scheduler.apply(1, answer(second), 0.0)
    fourth = planned(scheduler)
    assert (fourth.num_scheduled.tolist(), fourth.chunk_rows.size) == ([1], 0)  # the device sampled it
    assert scheduler.plan(1, 0.0) is None


def test_the_pipeline_holds_run_ahead_plans_and_length_is_predicted() -> None:
    scheduler = scheduler_with(replace(SPEC, run_ahead=4))
    scheduler.submit(request(1, max_tokens=2), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    assert (first.step_id, second.step_id) == (1, 2)
    assert scheduler.plan(1, 0.0) is None  # both tokens are promised
    scheduler.apply(1, answer(first), 0.0)
    events = scheduler.apply(1, answer(second), 0.0)
    assert events[0].finish_reason.tolist() == [FinishReason.LENGTH]
    frees = planned(scheduler)
    assert (frees.rows.size, frees.freed_rows.tolist()) == (0, first.rows.tolist())
    scheduler.apply(1, answer(frees), 0.0)
    assert not scheduler.can_plan(1)
    assert scheduler.counters.discarded_tokens == 0


def test_a_stop_token_is_seen_late_and_its_extra_token_dropped() -> None:
    scheduler = scheduler_with(SPEC)
    scheduler.submit(request(1, max_tokens=9, stop_token_ids=(7,)), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    events = scheduler.apply(1, answer(first, token=7), 0.0)
    assert events[0].finish_reason.tolist() == [FinishReason.STOP]
    assert events[0].token_ids.tolist() == [7]
    assert scheduler.apply(1, answer(second), 0.0) == []
    assert scheduler.counters.discarded_tokens == 1


def test_stop_tokens_count_from_min_tokens_on() -> None:
    scheduler = scheduler_with(SPEC)
    scheduler.submit(request(1, max_tokens=9, min_tokens=3, stop_token_ids=(5, 6, 7, 8, 9)), 0.0)
    finish = [step(scheduler, token=9)[0].finish_reason.tolist() for _ in range(3)]
    assert finish == [[0], [0], [FinishReason.STOP]]


def test_a_shared_prompt_is_computed_once() -> None:
    scheduler = scheduler_with(SPEC)
    for handle in (1, 2):
        scheduler.submit(request(handle, prompt=np.arange(11)), 0.0)
    scheduler.submit(request(3), 0.0)  # shares nothing, so it doesn't wait for them
    first, second = planned(scheduler), planned(scheduler)
    assert [new.request.handle for new in first.new_rows] == [1, 3]
    assert [(new.request.handle, new.num_computed) for new in second.new_rows] == [(2, 8)]
    assert second.new_rows[0].block_ids[:2].tolist() == first.new_rows[0].block_ids[:2].tolist()
    assert [admitted.cached_tokens for admitted in scheduler.take_admitted()] == [0, 0, 8]


def test_tenants_with_other_salts_share_nothing() -> None:
    scheduler = scheduler_with(SPEC)
    for handle, salt in ((1, b"a"), (2, b"b")):
        scheduler.submit(request(handle, num_prompt=8, prompt=np.arange(8), cache_salt=salt), 0.0)
    assert [new.num_computed for new in planned(scheduler).new_rows] == [0, 0]


def test_a_cached_prefix_decides_between_idle_workers_and_load_without_one() -> None:
    scheduler = scheduler_with(SPEC, SPEC)
    scheduler.submit(request(1, prompt=np.arange(12)), 0.0)
    assert scheduler.plan(2, 0.0) is None  # worker 1 is as good and comes first
    step(scheduler)
    scheduler.submit(request(2), 0.0)
    assert [new.request.handle for new in planned(scheduler, 2).new_rows] == [2]
    scheduler.submit(request(3, prompt=np.arange(12)), 0.0)
    assert scheduler.plan(2, 0.0).new_rows == []  # type: ignore[union-attr]
    assert [new.request.handle for new in planned(scheduler).new_rows] == [3]


def test_the_lowest_priority_then_the_latest_is_preempted() -> None:
    scheduler = scheduler_with(replace(SPEC, num_blocks=7, max_num_batched_tokens=32), watermark=0.0)
    for handle, priority in ((1, 0), (2, 1), (3, 0)):
        scheduler.submit(request(handle, num_prompt=8, priority=priority, arrival=float(handle)), 0.0)
    for _ in range(2):
        step(scheduler)
    assert scheduler.counters.preemptions == 1
    running = set(scheduler.snapshot().workers[0].handles.tolist())
    assert running == {1, 2}
    scheduler.check_integrity()


# Results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_id": 2}, "step_id"),
        ({"num_tokens": np.ones(3, np.uint8)}, "num_tokens"),
        ({"num_tokens": np.array([2, 1], np.uint8)}, "num_tokens"),
        ({"num_tokens": np.array([0, 1], np.uint8), "token_ids": np.array([7], np.int32)}, "num_tokens"),
        ({"token_ids": np.array([7], np.int32)}, "token_ids"),
        ({"token_ids": np.array([7, -1], np.int32)}, "negative"),
        ({"row_status": np.zeros(1, np.uint8)}, "row_status"),
        ({"row_status": np.array([0, 9], np.uint8)}, "row_status"),
    ],
)
def test_a_result_that_does_not_answer_the_plan_changes_nothing(change: dict, message: str) -> None:
    scheduler = scheduler_with(SPEC)
    scheduler.submit(request(1), 0.0)
    scheduler.submit(request(2), 0.0)
    good = answer(planned(scheduler))
    with pytest.raises(InvalidResult, match=message):
        scheduler.apply(1, replace(good, **change), 0.0)
    assert scheduler.apply(1, good, 0.0)[0].num_tokens.tolist() == [1, 1]
    with pytest.raises(InvalidResult, match="none"):
        scheduler.apply(1, good, 0.0)


def test_each_router_gets_its_own_columns() -> None:
    scheduler = scheduler_with(SPEC)
    for router_id, handle in ((1, 5), (2, 5), (1, 6)):
        scheduler.submit(request(handle, router_id=router_id), 0.0)
    plan = planned(scheduler)
    tokens = np.array([10, 11, 12], np.int32)
    events = scheduler.apply(1, StepResult(plan.step_id, np.ones(3, np.uint8), tokens), 0.0)
    seen = {
        (c.router_id, h): (t, i) for c in events for h, t, i in zip(c.handles, c.token_ids, c.plan_index, strict=True)
    }
    order = [(new.request.router_id, new.request.handle) for new in plan.new_rows]
    assert seen == {key: (10 + place, place) for place, key in enumerate(order)}


def test_a_nan_ends_one_request_and_its_blocks_are_never_hit() -> None:
    scheduler = scheduler_with(SPEC)
    scheduler.submit(request(1, prompt=np.arange(8)), 0.0)
    scheduler.submit(request(2), 0.0)
    plan = planned(scheduler)
    status = np.array([RowStatus.NAN, RowStatus.OK], np.uint8)
    result = StepResult(plan.step_id, (status == 0).astype(np.uint8), np.array([7], np.int32), status)
    (columns,) = scheduler.apply(1, result, 0.0)
    assert columns.num_tokens.tolist() == [0, 1]
    assert columns.finish_reason.tolist() == [FinishReason.ERROR, FinishReason.NONE]
    assert columns.token_ids.tolist() == [7]
    scheduler.submit(request(3, prompt=np.arange(8)), 0.0)
    assert planned(scheduler).new_rows[0].num_computed == 0
    scheduler.check_integrity()


def test_chunks_with_prompt_logprobs_are_passed_on_though_they_sample_nothing() -> None:
    scheduler = scheduler_with(SPEC)
    scheduler.submit(request(1, num_prompt=20, prompt_logprobs=True), 0.0)
    (silent,) = step(scheduler)
    assert (silent.num_tokens.tolist(), silent.plan_index.tolist(), silent.token_ids.size) == ([0], [0], 0)
    (last,) = step(scheduler)
    assert last.num_tokens.tolist() == [1]


def test_blocks_of_sampled_tokens_are_hit_by_the_next_turn() -> None:
    scheduler = scheduler_with(SPEC)
    scheduler.submit(request(1, prompt=np.arange(6), max_tokens=8), 0.0)
    for _ in range(8):
        step(scheduler)
    turn = np.concatenate((np.arange(6), np.full(8, 7), [1, 2]))
    scheduler.submit(request(2, prompt=turn), 0.0)
    assert planned(scheduler).new_rows[0].num_computed == 12  # 13 tokens were computed: three full blocks


# Failures


def test_a_lost_worker_gives_back_prompt_and_outputs_apart() -> None:
    scheduler = scheduler_with(SPEC, SPEC)
    scheduler.submit(request(1), 0.0)
    step(scheduler)
    step(scheduler)
    scheduler.remove_worker(1, 0.0)
    (new,) = planned(scheduler, 2).new_rows
    assert (new.num_prompt_tokens, new.num_computed) == (4, 0)
    assert new.token_ids.tolist() == [1000, 1001, 1002, 1003, 7, 7]
    (columns,) = scheduler.apply(2, StepResult(1, np.ones(1, np.uint8), np.array([8], np.int32)), 0.0)
    assert columns.first_output_index.tolist() == [2]
    assert len(scheduler.take_admitted()) == 2  # a row, and another one
    assert scheduler.take_preempted() == []


def test_a_cancelled_handle_waits_for_the_plans_that_name_it() -> None:
    scheduler = scheduler_with(SPEC)
    scheduler.submit(request(1), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    assert scheduler.cancel((1, 1), 0.0)
    assert not scheduler.cancel((1, 1), 0.0)
    scheduler.submit(request(1), 0.0)
    assert scheduler.apply(1, answer(first), 0.0) == []
    assert planned(scheduler).new_rows == []  # only the freed row
    assert scheduler.apply(1, answer(second), 0.0) == []
    assert planned(scheduler).new_rows[0].request.handle == 1


def test_plans_after_a_failed_one_are_void_and_their_failure_is_no_news() -> None:
    scheduler = scheduler_with(SPEC)
    scheduler.submit(request(1), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    failed = StepResult(first.step_id, np.empty(0), np.empty(0), ok=False)
    assert scheduler.apply(1, failed, 0.0) == []
    scheduler.submit(request(2), 0.0)
    third = planned(scheduler)
    assert third.freed_rows.tolist() == first.rows.tolist()
    assert [new.request.handle for new in third.new_rows] == [2]  # 1 waits for the second plan
    assert scheduler.apply(1, replace(failed, step_id=second.step_id), 0.0) == []
    assert scheduler.num_running(1) == 1
    assert scheduler.apply(1, answer(third), 0.0)[0].handles.tolist() == [2]
    assert scheduler.counters.failed_steps == 1


def test_a_request_that_fails_every_step_is_poison() -> None:
    scheduler = scheduler_with(SPEC, max_failures_alone=3)
    scheduler.submit(request(1), 0.0)
    for _ in range(3):
        assert scheduler.take_failed() == []
        scheduler.apply(1, StepResult(planned(scheduler).step_id, np.empty(0), np.empty(0), ok=False), 0.0)
    assert [(failed.handle, failed.reason) for failed in scheduler.take_failed()] == [(1, Reason.POISON)]
    assert scheduler.counters.failed_steps == 3
    scheduler.check_integrity()


def test_a_request_that_gets_on_between_failures_is_not_poison() -> None:
    scheduler = scheduler_with(SPEC, max_failures_alone=2)
    scheduler.submit(request(1, max_tokens=6), 0.0)
    for _ in range(4):
        step(scheduler)
        scheduler.apply(1, StepResult(planned(scheduler).step_id, np.empty(0), np.empty(0), ok=False), 0.0)
    assert scheduler.take_failed() == []
