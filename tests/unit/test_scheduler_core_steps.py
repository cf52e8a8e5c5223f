"""Steps, refusals and endings, one rule a test. What holds for every schedule is in tests/property/test_scheduler_core.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scheduler.core import (
    DuplicateRequest,
    FinishReason,
    InvalidField,
    InvalidResult,
    ModelChanged,
    ModelUnknown,
    NoWorker,
    QueueFull,
    Reason,
    Request,
    RowStatus,
    SamplingParams,
    Scheduler,
    Settings,
    StepPlan,
    StepResult,
    TokenColumns,
    UnknownWorker,
    Unplaceable,
    WorkerSpec,
)

DIGEST = b"d" * 32
SPEC = WorkerSpec("m", DIGEST, max_rows=4, max_num_batched_tokens=16, max_model_len=64, block_size=4, num_blocks=64)


def scheduler_with(*specs: WorkerSpec, **settings: object) -> Scheduler:
    scheduler = Scheduler(Settings(**settings))
    for worker_id, spec in enumerate(specs, start=1):
        scheduler.add_worker(worker_id, spec)
    return scheduler


def request(handle: int, num_prompt: int = 4, max_tokens: int = 4, *, router_id: int = 1, **options: object) -> Request:
    sampling = {k: options.pop(k) for k in ("min_tokens", "stop_token_ids", "prompt_logprobs") if k in options}
    prompt = options.pop("prompt", np.arange(num_prompt) + 1000 * handle)
    model = str(options.pop("model", "m"))
    return Request(router_id, handle, model, prompt, SamplingParams(max_tokens, **sampling), **options)


def planned(scheduler: Scheduler, worker_id: int = 1) -> StepPlan:
    plan = scheduler.plan(worker_id, 0.0)
    assert plan is not None
    return plan


def answer(plan: StepPlan, token: int = 7, **options: object) -> StepResult:
    count = int(plan.num_samples.sum())
    return StepResult(plan.step_id, np.ones(count, np.uint8), np.full(count, token, np.int32), **options)


def step(scheduler: Scheduler, worker_id: int = 1, token: int = 7) -> list[TokenColumns]:
    return scheduler.apply(worker_id, answer(planned(scheduler, worker_id), token), 0.0)


# Refusals


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
