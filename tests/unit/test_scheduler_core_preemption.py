"""Who waits with a higher priority takes the place of who runs with a lower one, and nobody takes turns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scheduler.core import Scheduler, StepPlan, StepResult
from tests.unit.core_steps import SPEC, answer, planned, request, scheduler_with, step

TWO_ROWS = replace(SPEC, max_rows=2)


def running(scheduler: Scheduler) -> set[int]:
    """Handles in rows."""
    return {int(handle) for worker in scheduler.snapshot().workers for handle in worker.handles}


def submit(scheduler: Scheduler, handle: int, priority: int, **options: object) -> None:
    scheduler.submit(request(handle, priority=priority, arrival=float(handle), **options), 0.0)


def new_handles(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [new.request.handle for new in plan.new_rows]


def test_the_row_of_the_lowest_priority_then_of_the_latest_is_taken() -> None:
    scheduler = scheduler_with(replace(SPEC, max_rows=4))
    for handle, priority in ((1, 0), (2, 1), (3, 0), (4, 1)):
        submit(scheduler, handle, priority, max_tokens=20)
    step(scheduler)
    submit(scheduler, 5, 2)
    assert new_handles(planned(scheduler)) == [5]
    assert running(scheduler) == {1, 2, 4, 5}
    submit(scheduler, 6, 2)
    plan = planned(scheduler)
    assert new_handles(plan) == [6]
    assert running(scheduler) == {2, 4, 5, 6}
    assert (scheduler.counters.preemptions, scheduler.counters.priority_preemptions) == (2, 2)
    scheduler.check_integrity()


def test_an_equal_waits() -> None:
    scheduler = scheduler_with(TWO_ROWS)
    for handle in (1, 2):
        submit(scheduler, handle, 1, max_tokens=20)
    step(scheduler)
    for handle, priority in ((3, 1), (4, 0)):
        submit(scheduler, handle, priority)
    for _ in range(5):
        step(scheduler)
    assert running(scheduler) == {1, 2}
    assert scheduler.counters.preemptions == 0


def test_the_preempted_one_comes_back_with_its_tokens_when_the_plans_that_name_it_have() -> None:
    scheduler = scheduler_with(replace(SPEC, max_rows=1))
    submit(scheduler, 1, 0, max_tokens=8)
    step(scheduler)
    second, third = planned(scheduler), scheduler.plan(1, 0.0)
    assert third is not None
    submit(scheduler, 2, 1, max_tokens=1)
    assert scheduler.apply(1, answer(second), 0.0)[0].first_output_index.tolist() == [1]
    fourth = planned(scheduler)
    assert new_handles(fourth) == [2]
    assert fourth.freed_rows.tolist() == fourth.rows.tolist()  # the row changes hands within the plan
    assert fourth.append_rows.size == 0
    assert scheduler.snapshot().num_parked == 1
    assert scheduler.apply(1, answer(third), 0.0) == []  # what it sampled after it had lost its row is dropped
    assert scheduler.snapshot().num_parked == 0
    scheduler.apply(1, answer(fourth), 0.0)
    (back,) = planned(scheduler).new_rows
    assert back.request.handle == 1
    assert back.token_ids.tolist() == [1000, 1001, 1002, 1003, 7, 7]
    assert (scheduler.counters.discarded_tokens, scheduler.counters.priority_preemptions) == (1, 1)
    assert scheduler.counters.recomputed_tokens > 0
    scheduler.check_integrity()


def test_the_preempted_one_goes_before_those_of_its_class_that_never_ran() -> None:
    scheduler = scheduler_with(replace(SPEC, max_rows=1))
    submit(scheduler, 1, 0, max_tokens=20)
    step(scheduler)
    submit(scheduler, 2, 0)
    submit(scheduler, 3, 1, max_tokens=1)
    step(scheduler)
    assert new_handles(planned(scheduler)) == [1]


def test_it_takes_as_many_as_it_needs_blocks_and_no_more() -> None:
    spec = replace(SPEC, max_rows=8, num_blocks=16, max_num_batched_tokens=64)
    scheduler = scheduler_with(spec, watermark=0.0)
    for handle in range(1, 5):
        submit(scheduler, handle, 0, num_prompt=13, max_tokens=3)  # four blocks each: all are taken
    step(scheduler)
    submit(scheduler, 5, 1, num_prompt=20, max_tokens=4)  # five blocks
    plan = planned(scheduler)
    assert new_handles(plan) == [5]
    assert running(scheduler) == {1, 2, 5}
    assert scheduler.counters.priority_preemptions == 2
    scheduler.check_integrity()


def test_nobody_is_preempted_in_vain() -> None:
    spec = replace(SPEC, max_rows=8, num_blocks=16, max_num_batched_tokens=64)
    scheduler = scheduler_with(spec, watermark=0.0)
    submit(scheduler, 1, 2, num_prompt=38, max_tokens=3)  # ten of sixteen blocks
    submit(scheduler, 2, 0, num_prompt=18, max_tokens=3)
    step(scheduler)
    submit(scheduler, 3, 1, num_prompt=32, max_tokens=4)  # eight blocks: that of 2 and the free ones don't suffice
    step(scheduler)
    assert running(scheduler) == {1, 2}
    assert scheduler.counters.preemptions == 0


def test_a_cached_prefix_that_only_victims_hold_is_not_counted_twice() -> None:
    spec = replace(SPEC, max_rows=8, num_blocks=8, max_num_batched_tokens=64)
    scheduler = scheduler_with(spec, watermark=0.0)
    shared = np.arange(12)
    submit(scheduler, 1, 0, prompt=np.concatenate((shared, [50])), max_tokens=3)
    submit(scheduler, 2, 0, num_prompt=13, max_tokens=3)
    step(scheduler)
    submit(
        scheduler, 3, 1, prompt=np.concatenate((shared, np.arange(60, 72))), max_tokens=8
    )  # six blocks, three of them cached
    plan = planned(scheduler)
    assert [(new.request.handle, new.num_computed) for new in plan.new_rows] == [(3, 12)]
    assert running(scheduler) == {1, 3}
    scheduler.check_integrity()


def test_the_lowest_priority_of_all_workers_goes_first() -> None:
    one_row = replace(SPEC, max_rows=1)
    scheduler = scheduler_with(one_row, one_row)
    for handle, priority in ((1, 1), (2, 0)):
        submit(scheduler, handle, priority, max_tokens=20)
        for worker_id in (1, 2):
            plan = scheduler.plan(worker_id, 0.0)
            if plan is not None:
                scheduler.apply(worker_id, answer(plan), 0.0)
    submit(scheduler, 3, 2)
    of_low = next(w.worker_id for w in scheduler.snapshot().workers if 2 in w.handles)
    assert new_handles(scheduler.plan(3 - of_low, 0.0)) == []
    assert new_handles(scheduler.plan(of_low, 0.0)) == [3]
    assert running(scheduler) == {1, 3}


def test_a_free_row_elsewhere_spares_everyone() -> None:
    one_row = replace(SPEC, max_rows=1)
    scheduler = scheduler_with(one_row, one_row)
    submit(scheduler, 1, 0, max_tokens=20)
    busy = 1 if scheduler.plan(1, 0.0) is not None else 2
    submit(scheduler, 2, 1)
    plan = scheduler.plan(busy, 0.0)
    assert plan is None or new_handles(plan) == []
    assert new_handles(scheduler.plan(3 - busy, 0.0)) == [2]
    assert scheduler.counters.preemptions == 0


def test_a_draining_worker_gives_no_row_away() -> None:
    one_row = replace(SPEC, max_rows=1)
    scheduler = scheduler_with(one_row, one_row)
    for handle in (1, 2):
        submit(scheduler, handle, 0, max_tokens=20)
        for worker_id in (1, 2):
            scheduler.plan(worker_id, 0.0)
    scheduler.drain_worker(1)
    submit(scheduler, 3, 1)
    plan = scheduler.plan(1, 0.0)
    assert plan is None or new_handles(plan) == []
    assert new_handles(scheduler.plan(2, 0.0)) == [3]


def test_one_plan_preempts_for_so_many_and_no_more() -> None:
    scheduler = scheduler_with(replace(SPEC, max_rows=6, max_num_batched_tokens=64), max_preempting=2)
    for handle in range(1, 7):
        submit(scheduler, handle, 0, max_tokens=30)
    step(scheduler)
    for handle in range(7, 12):
        submit(scheduler, handle, 1, max_tokens=30)
    taken = [len(new_handles(planned(scheduler))) for _ in range(2)]
    assert taken == [2, 2]
    assert scheduler.counters.priority_preemptions == 4


def test_a_suspect_waits_for_a_free_row() -> None:
    scheduler = scheduler_with(replace(SPEC, max_rows=1))
    submit(scheduler, 1, 0, max_tokens=3)
    step(scheduler)
    suspect = request(2, priority=5)
    suspect.suspicion = 1
    scheduler.submit(suspect, 0.0)
    for _ in range(2):
        step(scheduler)
    assert scheduler.counters.preemptions == 0
    assert new_handles(planned(scheduler)) == [2]


def test_a_stream_of_important_ones_lets_the_least_important_finish_in_the_gaps() -> None:
    """Each is preempted many times, and each time goes on where it stood: what was confirmed is never sampled again."""
    scheduler = scheduler_with(replace(SPEC, max_rows=2))
    for handle in (1, 2):
        submit(scheduler, handle, 0, max_tokens=30)
    got: dict[int, int] = {}
    for turn in range(200):
        if turn % 3 == 0 and turn < 60:
            submit(scheduler, 10 + turn, 1, max_tokens=2)
        plan = scheduler.plan(1, 0.0)
        if plan is None:
            break
        for columns in scheduler.apply(1, answer(plan), 0.0):
            for handle, first in zip(columns.handles.tolist(), columns.first_output_index.tolist(), strict=True):
                assert first == got.get(handle, 0)
                got[handle] = first + 1
        scheduler.check_integrity()
    assert got == {1: 30, 2: 30} | {10 + turn: 2 for turn in range(0, 60, 3)}
    assert scheduler.counters.priority_preemptions > 3


def test_the_router_is_told_who_gave_its_row_up_and_who_has_one_again() -> None:
    scheduler = scheduler_with(replace(SPEC, max_rows=1))
    submit(scheduler, 1, 0, max_tokens=8)
    first = planned(scheduler)
    assert ([a.handle for a in scheduler.take_admitted()], scheduler.take_preempted()) == ([1], [])
    scheduler.apply(1, answer(first), 0.0)
    submit(scheduler, 2, 1, max_tokens=1)
    second = planned(scheduler)
    assert [a.handle for a in scheduler.take_admitted()] == [2]
    assert [p.handle for p in scheduler.take_preempted()] == [1]
    assert scheduler.take_preempted() == []
    scheduler.apply(1, answer(second), 0.0)
    third = planned(scheduler)
    assert new_handles(third) == [1]
    assert [a.handle for a in scheduler.take_admitted()] == [1]
    submit(scheduler, 3, 1, max_tokens=1)
    scheduler.apply(1, answer(third), 0.0)
    planned(scheduler)
    scheduler.cancel((1, 1), 0.0)
    assert scheduler.take_preempted() == []  # it is gone


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_preempted_while_its_step_is_in_flight_is_no_suspect_of_the_next(fails: bool) -> None:
    scheduler = scheduler_with(replace(SPEC, max_rows=1))
    submit(scheduler, 1, 0, max_tokens=8)
    first = planned(scheduler)
    submit(scheduler, 2, 1, max_tokens=2)
    second = planned(scheduler)
    assert new_handles(second) == [2]
    none = np.empty(0, np.int32)
    scheduler.apply(1, StepResult(first.step_id, none, none, ok=False) if fails else answer(first), 0.0)
    if fails:  # 1 had left its row, so only 2 lost anything
        assert [(m.handle, bool(m.suspect_group)) for m in scheduler.take_migrated()] == [(2, True)]
    scheduler.check_integrity()
