"""Requests under grammars in the scheduler: who may run them, and what becomes of a row whose mask came too late."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scheduler.core import (
    QueueFull,
    Reason,
    Request,
    RowStatus,
    SamplingParams,
    Scheduler,
    Settings,
    StepPlan,
    StepResult,
    Unsupported,
    WorkerSpec,
    planner,
)
from scheduler.core.state import MASK_DELAY, MAX_MASK_DELAY

DIGEST = b"d" * 32
PLAIN = WorkerSpec("m", DIGEST, max_rows=4, max_num_batched_tokens=16, max_model_len=64, block_size=4, num_blocks=64)
ABLE = replace(PLAIN, grammars=True)


def request(handle: int, *, under_grammar: bool = True, max_tokens: int = 4) -> Request:
    prompt = np.arange(6) + 100 * handle
    return Request(1, handle, "m", prompt, SamplingParams(max_tokens), under_grammar=under_grammar)


def answer(plan: StepPlan, status: list[int]) -> StepResult:
    column = np.array(status, np.uint8)
    good = column == RowStatus.OK
    tokens = np.full(int(good.sum()), 7, np.int32)
    return StepResult(plan.step_id, good.astype(np.uint8), tokens, column if column.any() else None)


def planned(scheduler: Scheduler, now: float = 0.0, worker_id: int = 1) -> StepPlan:
    plan = scheduler.plan(worker_id, now)
    assert plan is not None
    scheduler.check_integrity()
    return plan


def test_only_workers_that_can_follow_a_grammar_get_it() -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, PLAIN)
    with pytest.raises(Unsupported):
        scheduler.submit(request(1), 0.0)
    scheduler.add_worker(2, ABLE)
    for handle in range(1, 4):
        scheduler.submit(request(handle), 0.0)
    assert scheduler.plan(1, 0.0) is None
    assert len(planned(scheduler, worker_id=2).new_rows) == 3
    scheduler.submit(request(9, under_grammar=False), 0.0)


def test_the_grammars_of_one_plan_are_bounded_and_who_waits_for_that_is_next() -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, replace(ABLE, max_num_batched_tokens=64))
    for handle, extra_bytes in ((1, 6 << 20), (2, 3 << 20), (3, 1 << 20), (4, 20 << 20)):
        scheduler.submit(replace(request(handle), extra_bytes=extra_bytes), 0.0)
    plans = [planned(scheduler), planned(scheduler)]
    scheduler.apply(1, answer(plans[0], [RowStatus.OK] * int(plans[0].num_samples.sum())), 0.0)
    plans.append(planned(scheduler))
    assert [[new.request.handle for new in plan.new_rows] for plan in plans] == [[1], [2, 3], [4]]


def test_a_grammar_counts_in_the_queue_as_the_tokens_that_it_weighs() -> None:
    scheduler = Scheduler(Settings(max_waiting_tokens=1_000))
    scheduler.add_worker(1, ABLE)
    with pytest.raises(QueueFull):
        scheduler.submit(replace(request(1), extra_bytes=6_000), 0.0)
    scheduler.submit(replace(request(1), extra_bytes=3_000), 0.0)
    scheduler.check_integrity()


def run_step(scheduler: Scheduler, worker_id: int, now: float = 0.0) -> StepPlan:
    plan = planned(scheduler, now, worker_id)
    scheduler.apply(worker_id, answer(plan, [RowStatus.OK] * int(plan.num_samples.sum())), now)
    return plan


def with_able_worker_full(plain: WorkerSpec = PLAIN) -> Scheduler:
    """Worker 1 can't follow grammars and is idle; worker 2 has no row left."""
    scheduler = Scheduler()
    scheduler.add_worker(1, plain)
    scheduler.add_worker(2, ABLE)
    for handle in range(1, 5):
        scheduler.submit(request(handle, max_tokens=40), 0.0)
    admitted = 0
    while admitted < 4:
        admitted += len(run_step(scheduler, 2).new_rows)
    return scheduler


def admitted_by(scheduler: Scheduler, worker_id: int) -> list[int]:
    return [row.request.handle for row in planned(scheduler, 0.2, worker_id).new_rows]


def test_those_who_wait_for_an_able_worker_hold_up_no_other() -> None:
    scheduler = with_able_worker_full()
    assert Settings().max_candidates < 40
    for handle in range(10, 50):
        scheduler.submit(request(handle), 0.0)
    assert scheduler.plan(1, 0.1) is None
    for handle in (60, 61):
        scheduler.submit(request(handle, under_grammar=False), 0.1)
    assert admitted_by(scheduler, 1) == [60, 61]
    # They have lost no place: the oldest is next where there is room.
    scheduler.cancel((1, 1), 0.2)
    assert admitted_by(scheduler, 2) == [10]


def test_a_suspect_under_a_grammar_holds_up_only_those_who_could_try_it() -> None:
    scheduler = Scheduler()
    for worker_id, spec in ((1, PLAIN), (2, ABLE), (3, ABLE)):
        scheduler.add_worker(worker_id, spec)
    for handle in (1, 2):
        scheduler.submit(request(handle), 0.0)
    planned(scheduler, worker_id=2)
    scheduler.remove_worker(2, 0.0)
    scheduler.submit(request(9, under_grammar=False), 0.1)
    assert admitted_by(scheduler, 1) == [9]
    assert admitted_by(scheduler, 3) == [1]


def test_a_worker_that_runs_something_looks_far_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "LOOK_PAST", 8)
    scheduler = with_able_worker_full(replace(PLAIN, run_ahead=1))
    for handle in range(10, 30):
        scheduler.submit(request(handle), 0.0)
    admitted: list[int] = []
    for step in range(1, 2 * planner.LOOK_FAR_EVERY):
        if step < 4:
            scheduler.submit(request(100 + step, under_grammar=False, max_tokens=50), 0.1)
        admitted += [step for _ in run_step(scheduler, 1, 0.2).new_rows]
    # Idle, then the first look, then the next.
    assert admitted == [1, 2, 2 + planner.LOOK_FAR_EVERY]


def test_one_whose_last_able_worker_left_is_told_so() -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, ABLE)
    scheduler.submit(request(1), 0.0)
    scheduler.add_worker(2, PLAIN)
    scheduler.remove_worker(1, 0.0)
    assert scheduler.plan(2, 0.0) is None
    (failed,) = scheduler.take_failed()
    assert failed.reason is Reason.UNSUPPORTED


def test_a_late_mask_costs_its_row_only_and_for_a_moment() -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, ABLE)
    scheduler.submit(request(1), 0.0)
    scheduler.submit(request(2, under_grammar=False), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    late = [int(row.request.under_grammar) * RowStatus.MASK_LATE for row in first.new_rows]
    (events,) = scheduler.apply(1, answer(first, late), 1.0)
    assert events.handles.tolist() == [1, 2] and events.num_tokens.tolist() == [0, 1]
    assert not events.finish_reason.any()
    scheduler.check_integrity()
    # The plan in flight names it still; what comes of that is dropped.
    (events,) = scheduler.apply(1, answer(second, late), 1.0)
    assert events.handles.tolist() == [2]
    third = planned(scheduler, 1.0)
    assert third.rows.size == 1 and not third.new_rows and third.freed_rows.size == 1
    assert scheduler.counters.late_masks == 1
    # After a moment it is planned again, its prompt found in the cache.
    assert scheduler.next_deadline() == 1.0 + MASK_DELAY
    scheduler.expire(1.0 + MASK_DELAY)
    (again,) = planned(scheduler, 2.0).new_rows
    assert again.request.handle == 1 and again.num_computed == 4
    assert scheduler.next_deadline() is None


def test_a_request_that_is_late_again_waits_twice_as_long() -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, ABLE)
    scheduler.submit(request(1), 0.0)
    now, delays = 0.0, []
    for _ in range(9):
        scheduler.apply(1, answer(planned(scheduler, now), [RowStatus.MASK_LATE]), now)
        again = scheduler.next_deadline()
        assert again is not None
        delays.append(again - now)
        now = again
        scheduler.expire(now)
    assert delays == pytest.approx([MASK_DELAY * 2**k for k in range(6)] + [MAX_MASK_DELAY] * 3)
    # One that has got further begins anew, and is not held up by those that wait longer.
    scheduler.submit(request(2), now)
    first, second = planned(scheduler, now), planned(scheduler, now)
    assert [row.request.handle for row in first.new_rows] == [1, 2]
    scheduler.apply(1, answer(first, [RowStatus.OK, RowStatus.OK]), now)
    scheduler.apply(1, answer(second, [RowStatus.MASK_LATE, RowStatus.OK]), now)
    assert scheduler.next_deadline() == now + MASK_DELAY


def test_tries_for_want_of_a_mask_are_one_admission() -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, ABLE)
    scheduler.submit(request(1), 0.0)
    plan = planned(scheduler)
    assert [admitted.handle for admitted in scheduler.take_admitted()] == [1]
    admission_gap = scheduler._state.admission_gap
    for now in range(1, 6):
        scheduler.apply(1, answer(plan, [RowStatus.MASK_LATE]), now)
        scheduler.expire(now + MAX_MASK_DELAY)
        plan = planned(scheduler, now + MAX_MASK_DELAY)
        assert len(plan.new_rows) == 1 and scheduler.take_admitted() == []
    scheduler.apply(1, answer(plan, [RowStatus.OK]), 7.0)
    counters = scheduler.counters
    assert (counters.admitted, counters.late_masks, counters.recomputed_tokens) == (1, 5, 0)
    assert (counters.prefix_queries, counters.prefix_hits) == (6, 0)
    assert scheduler._state.admission_gap == admission_gap
    # What happens to it afterwards counts as ever.
    scheduler.remove_worker(1, 8.0)
    scheduler.add_worker(2, ABLE)
    planned(scheduler, 8.0, worker_id=2)
    assert [admitted.handle for admitted in scheduler.take_admitted()] == [1]
    assert counters.admitted == 2 and counters.recomputed_tokens == 6


def test_a_loss_after_a_late_mask_is_news_though_it_had_no_token() -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, ABLE)
    scheduler.submit(request(1), 0.0)
    scheduler.apply(1, answer(planned(scheduler), [RowStatus.MASK_LATE]), 0.0)
    scheduler.expire(MASK_DELAY)
    planned(scheduler, 1.0)
    scheduler.take_admitted()
    scheduler.remove_worker(1, 1.0)
    scheduler.add_worker(2, ABLE)
    planned(scheduler, 2.0, worker_id=2)
    assert [admitted.handle for admitted in scheduler.take_admitted()] == [1]
    assert scheduler.counters.admitted == 2


def test_delays_end_in_the_order_of_their_times() -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, ABLE)
    scheduler.submit(request(1), 0.0)
    now = 0.0
    for _ in range(3):
        scheduler.apply(1, answer(planned(scheduler, now), [RowStatus.MASK_LATE]), now)
        now += MAX_MASK_DELAY
        scheduler.expire(now)
    scheduler.apply(1, answer(planned(scheduler, now), [RowStatus.MASK_LATE]), now)
    scheduler.submit(request(2), now)
    scheduler.apply(1, answer(planned(scheduler, now), [RowStatus.MASK_LATE]), now)
    assert scheduler.next_deadline() == now + MASK_DELAY
    scheduler.expire(now + MASK_DELAY)
    (row,) = planned(scheduler, now + MASK_DELAY).new_rows
    assert row.request.handle == 2 and scheduler.next_deadline() == now + 8 * MASK_DELAY


def test_one_that_waits_for_its_grammar_can_be_cancelled() -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, ABLE)
    scheduler.submit(request(1), 0.0)
    scheduler.apply(1, answer(planned(scheduler), [RowStatus.MASK_LATE]), 0.0)
    assert scheduler.cancel((1, 1), 0.0)
    scheduler.expire(1.0)
    scheduler.check_integrity()
    assert scheduler.load().waiting == 0


def test_one_that_waits_for_its_grammar_outlives_its_worker() -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, ABLE)
    scheduler.submit(request(1), 0.0)
    scheduler.apply(1, answer(planned(scheduler), [RowStatus.MASK_LATE]), 0.0)
    scheduler.remove_worker(1, 0.0)
    scheduler.expire(1.0)
    scheduler.check_integrity()
    # Nobody else holds the model: in time it is told so.
    assert scheduler.next_deadline() == 60.0
    scheduler.add_worker(2, ABLE)
    assert len(planned(scheduler, worker_id=2).new_rows) == 1
