"""Who the scheduler core lets in, how long they wait and when they are let go, one rule a test.

What holds for every schedule is in tests/property/test_scheduler_core.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scheduler.core import (
    DuplicateRequest,
    InvalidField,
    ModelChanged,
    ModelUnknown,
    NoWorker,
    QueueFull,
    Reason,
    Scheduler,
    UnknownWorker,
    Unplaceable,
)
from tests.unit.core_steps import DIGEST, SPEC, answer, planned, request, scheduler_with, step


def test_each_refusal_has_its_type_and_changes_nothing() -> None:
    scheduler = scheduler_with(SPEC, max_waiting_requests=2)
    with pytest.raises(ModelUnknown):
        scheduler.submit(request(1, model="other"), 0.0)
    with pytest.raises(ModelChanged):
        scheduler.submit(request(1, digest=b"e" * 32), 0.0)
    with pytest.raises(Unplaceable):
        scheduler.submit(request(1, num_prompt=64), 0.0)
    scheduler.submit(request(1), 0.0)
    with pytest.raises(DuplicateRequest):
        scheduler.submit(request(1), 0.0)
    scheduler.submit(request(2), 0.0)
    with pytest.raises(QueueFull) as caught:
        scheduler.submit(request(3), 0.0)
    assert caught.value.retry_after > 0
    assert scheduler.load().waiting == 2
    scheduler.check_integrity()
    assert scheduler.counters.refused == 5


def test_the_queue_is_bounded_by_tokens_too() -> None:
    scheduler = scheduler_with(SPEC, max_waiting_tokens=10)
    scheduler.submit(request(1, num_prompt=6), 0.0)
    with pytest.raises(QueueFull):
        scheduler.submit(request(2, num_prompt=6), 0.0)
    scheduler.submit(request(3, num_prompt=4), 0.0)


def refused(scheduler: Scheduler, handle: int, now: float = 0.0, **options: object) -> float | None:
    """Submits; the time to come again in seconds if it is refused."""
    try:
        scheduler.submit(request(handle, **options), now)
    except QueueFull as error:
        return error.retry_after
    return None


def test_a_tenant_that_floods_the_queue_leaves_room_for_others() -> None:
    scheduler = scheduler_with(max_waiting_requests=6)
    scheduler.add_worker(1, replace(SPEC, max_rows=1))
    handles = iter(range(1000))
    accepted = {
        tenant: sum(refused(scheduler, next(handles), tenant=tenant) is None for _ in range(100)) for tenant in "abc"
    }
    assert accepted["a"] == 6  # alone it has the whole queue
    assert accepted["b"] == 3  # (3 + 9) / 2 = 6
    assert accepted["c"] == 2
    assert scheduler.load().waiting <= 12


def test_lower_priorities_keep_nobody_out_and_everything_together_is_bounded() -> None:
    scheduler = scheduler_with(SPEC, max_waiting_requests=4)
    handles = iter(range(1000))
    accepted = [
        sum(refused(scheduler, next(handles), priority=priority) is None for _ in range(20)) for priority in range(8)
    ]
    assert accepted == [4, 4, 4, 4, 0, 0, 0, 0]
    assert refused(scheduler, next(handles), priority=-1) is not None
    assert scheduler.load().waiting == 16


def test_the_time_to_come_again_follows_the_rate_of_admissions() -> None:
    scheduler = scheduler_with(replace(SPEC, max_rows=1), max_waiting_requests=40)
    handles = iter(range(1000))
    now = 1000.0  # nothing happened for long: that is no rate
    for _ in range(200):
        while refused(scheduler, next(handles), now, max_tokens=1) is None:
            pass
        now += 0.5
        scheduler.apply(1, answer(scheduler.plan(1, now)), now)  # type: ignore[arg-type]
    scheduler.submit(request(next(handles), max_tokens=1), now)
    hint = refused(scheduler, next(handles), now)
    assert hint == pytest.approx(0.5 * 4, rel=0.1)  # a tenth of the queue, at one admission in 0.5 s
    stalled = refused(scheduler, next(handles), now + 5)
    assert stalled == pytest.approx(5 * 4, rel=0.1)


def test_a_deadline_that_passes_frees_the_place_in_the_queue_or_the_row_and_its_blocks() -> None:
    scheduler = scheduler_with(replace(SPEC, max_rows=1), max_waiting_requests=1)
    scheduler.submit(request(1, max_tokens=20, deadline=3.0), 0.0)
    step(scheduler)
    scheduler.submit(request(2, max_tokens=20, deadline=2.0), 0.0)
    assert refused(scheduler, 3) is not None
    scheduler.expire(2.0)
    assert [(failed.handle, failed.reason) for failed in scheduler.take_failed()] == [(2, Reason.DEADLINE)]
    assert refused(scheduler, 4, 2.0, max_tokens=1) is None
    in_flight = planned(scheduler)
    scheduler.expire(3.0)
    assert [(failed.handle, failed.reason) for failed in scheduler.take_failed()] == [(1, Reason.DEADLINE)]
    plan = planned(scheduler)
    assert plan.freed_rows.tolist() == in_flight.rows.tolist()
    assert [new.request.handle for new in plan.new_rows] == [4]
    assert scheduler.apply(1, answer(in_flight), 0.0) == []
    scheduler.apply(1, answer(plan), 0.0)
    assert [worker.used_blocks for worker in scheduler.snapshot().workers] == [0]
    assert scheduler.load().waiting == 0


def test_a_resumed_request_is_never_refused_for_a_full_queue() -> None:
    scheduler = scheduler_with(SPEC, max_waiting_requests=1)
    scheduler.submit(request(1), 0.0)
    scheduler.submit(request(2, output_token_ids=np.array([5])), 0.0)
    assert planned(scheduler).new_rows[0].request.handle == 2


def test_a_request_that_no_block_pool_can_hold_is_refused_at_once() -> None:
    scheduler = scheduler_with(replace(SPEC, num_blocks=4))
    scheduler.submit(request(1, num_prompt=10, max_tokens=7), 0.0)  # 16 tokens are computed, the last one is not
    with pytest.raises(Unplaceable, match="KV cache"):
        scheduler.submit(request(2, num_prompt=10, max_tokens=8), 0.0)


def test_a_model_without_worker_refuses_new_requests_and_lets_resumed_ones_wait() -> None:
    scheduler = scheduler_with(SPEC, no_worker_timeout=10.0)
    scheduler.submit(request(1), 0.0)
    scheduler.remove_worker(1, 1.0)
    with pytest.raises(NoWorker):
        scheduler.submit(request(2), 1.0)
    scheduler.submit(request(3, output_token_ids=np.array([5]), digest=DIGEST), 2.0)
    assert scheduler.next_deadline() == 11.0
    scheduler.expire(10.9)
    assert scheduler.take_failed() == []
    scheduler.expire(11.0)
    assert [(failed.handle, failed.reason) for failed in scheduler.take_failed()] == [
        (3, Reason.NO_WORKER),
        (1, Reason.NO_WORKER),
    ]
    assert scheduler.next_deadline() is None
    scheduler.check_integrity()


def test_unknown_workers_and_double_ones_are_named() -> None:
    scheduler = scheduler_with(SPEC)
    with pytest.raises(UnknownWorker):
        scheduler.plan(9, 0.0)
    with pytest.raises(InvalidField):
        scheduler.add_worker(1, SPEC)


def test_a_draining_worker_takes_nothing_new_and_finishes_what_it_has() -> None:
    scheduler = scheduler_with(SPEC)
    scheduler.submit(request(1, max_tokens=3), 0.0)
    step(scheduler)
    scheduler.submit(request(2), 0.0)
    scheduler.drain_worker(1)
    with pytest.raises(NoWorker):
        scheduler.submit(request(3), 0.0)
    while scheduler.num_running(1):
        assert all(columns.handles.tolist() == [1] for columns in step(scheduler))
    scheduler.add_worker(2, SPEC)
    assert planned(scheduler, 2).new_rows[0].request.handle == 2


def test_detach_cancels_what_the_router_had_and_nothing_else() -> None:
    scheduler = scheduler_with(SPEC)
    for router_id in (1, 2):
        for handle in range(4):
            scheduler.submit(request(handle, router_id=router_id), 0.0)
    planned(scheduler)
    assert scheduler.detach_router(1, 0.0) == 4
    assert scheduler.detach_router(1, 0.0) == 0
    load = scheduler.load()
    assert load.waiting + load.running == 4
    scheduler.check_integrity()


def test_many_cancelled_deadlines_leave_memory() -> None:
    scheduler = scheduler_with(SPEC)
    for handle in range(1000):
        scheduler.submit(request(handle, deadline=1e6), 0.0)
        scheduler.cancel((1, handle), 0.0)
    assert len(scheduler._deadlines) < 200
    assert scheduler.next_deadline() is None


def test_how_long_requests_waited_for_a_new_worker_is_told_once() -> None:
    scheduler = scheduler_with(SPEC, SPEC)
    for handle in range(3):
        scheduler.submit(request(handle, max_tokens=9), 0.0)
    assert scheduler.plan(1, 0.0) is not None
    running = scheduler.num_running(1)
    assert running > 0
    scheduler.remove_worker(1, 5.0)
    assert scheduler.take_recoveries() == []
    assert scheduler.plan(2, 5.25) is not None  # its own step, or that of the first half of the suspects
    first = scheduler.take_recoveries()
    assert first and set(first) == {0.25} and len(first) <= running
    assert scheduler.take_recoveries() == []


def test_who_was_accepted_elsewhere_is_not_refused_and_waits_for_a_worker() -> None:
    """Its scheduler is gone and its client was told Started: it has no token yet, but a promise."""
    scheduler = scheduler_with(SPEC, max_waiting_requests=1)
    scheduler.drain_worker(1)
    with pytest.raises(NoWorker):
        scheduler.submit(request(0, digest=SPEC.model_digest), 0.0)
    for handle in range(1, 4):
        scheduler.submit(request(handle, accepted=True, digest=SPEC.model_digest), 0.0)
    scheduler.add_worker(2, SPEC)
    with pytest.raises(QueueFull):
        scheduler.submit(request(9), 0.0)
    plan = scheduler.plan(2, 0.0)
    assert plan is not None and [new.request.handle for new in plan.new_rows] == [1, 2, 3]
