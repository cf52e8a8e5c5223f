"""Requests at the scheduler's hub: admission, delivery, recovery and what routers and operators hear of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from octavo.v1 import common_pb2, scheduler_pb2, step_pb2

from scheduler.core import Settings
from scheduler.inspect import inspect, list_workers, only_changes
from service.columns import pack, unpack
from service.errors import OctavoError, Reason
from tests.unit.hub_cluster import Cluster, failures, hello, sampling, submit


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_a_request_runs_from_submit_to_its_last_token(cluster: Cluster) -> None:
    cluster.say(submit=submit(seed=77))
    outputs: list[int] = []
    finish = b""
    kinds: list[str | None] = []
    waiting = cluster.plans()
    assert waiting[0].new_rows[0].seed == 77
    for _ in range(10):
        for plan in waiting:
            cluster.answer(plan, token=len(outputs) + 40)
            for message in cluster.from_router():
                kinds.append(message.WhichOneof("message"))
                if message.HasField("tokens"):
                    assert unpack("", message.tokens.first_output_index, np.int32).tolist() == [len(outputs)]
                    outputs += unpack("", message.tokens.token_ids, np.int32).tolist()
                    finish = message.tokens.finish_reason
        waiting = cluster.plans()
    assert len(outputs) == 3
    assert finish == bytes([common_pb2.FINISH_REASON_LENGTH])
    assert kinds[0] == "admitted"
    cluster.hub.core.check_integrity()


def test_a_router_hears_of_a_preemption_and_of_the_row_that_follows(cluster: Cluster) -> None:
    cluster.hub.worker_gone(cluster.worker, 0.0)
    cluster.worker = cluster.enlist(hello(incarnation=2, max_rows=1))
    heard = []
    for handle, priority in ((1, 0), (2, 1)):
        cluster.say(submit=submit(handle, max_tokens=9 if handle == 1 else 1, priority=priority))
        for plan in cluster.plans():
            cluster.answer(plan)
    while plans := cluster.plans():
        for plan in plans:
            cluster.answer(plan)
    for message in cluster.from_router():
        kind = message.WhichOneof("message")
        if kind in ("admitted", "preempted"):
            heard.append((kind, getattr(message, kind).handle))
    assert heard == [("admitted", 1), ("admitted", 2), ("preempted", 1), ("admitted", 1)]


def test_steps_that_wait_to_be_sent_become_one_batch(cluster: Cluster) -> None:
    cluster.say(submit=submit(1, length=8))
    cluster.say(submit=submit(2, length=6))
    for _ in range(3):
        for plan in cluster.plans():
            cluster.answer(plan)
    batches = [m.tokens for m in cluster.from_router() if m.HasField("tokens")]
    assert len(batches) == 1
    assert unpack("", batches[0].handles, np.uint32).tolist() == [1, 2, 1, 2, 1, 2]
    assert unpack("", batches[0].first_output_index, np.int32).tolist() == [0, 0, 1, 1, 2, 2]


def test_logprobs_go_to_the_entry_that_they_describe(cluster: Cluster) -> None:
    cluster.say(submit=submit(1))
    cluster.say(submit=submit(2, length=6))
    (plan, *_) = cluster.plans()
    columns = common_pb2.LogprobColumns(
        owner=pack([1], np.int32),
        position=pack([6], np.int32),
        rank=pack([1], np.int32),
        num_entries=pack([2], np.int32),
        token_ids=pack([42, 43], np.int32),
        logprobs=pack([-0.5, -1.5], np.float32),
    )
    cluster.answer(plan, logprobs=columns)
    (batch,) = [m.tokens for m in cluster.from_router() if m.HasField("tokens")]
    entry = int(unpack("", batch.logprobs.owner, np.int32)[0])
    assert unpack("", batch.handles, np.uint32)[entry] == 2
    assert batch.logprobs.token_ids == columns.token_ids


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"model": "other"}, Reason.MODEL_UNKNOWN),
        ({"prompt": [], "num_prompt_tokens": 0}, Reason.INVALID_ARGUMENT),
        ({"num_prompt_tokens": 4}, Reason.INVALID_ARGUMENT),
        (
            {"prompt": [scheduler_pb2.Segment(token_ids=pack([1000], np.int32))], "num_prompt_tokens": 1},
            Reason.INVALID_ARGUMENT,
        ),
        ({"prompt": [scheduler_pb2.Segment(token_ids=b"abc")]}, Reason.PROTOCOL_VIOLATION),
        ({"prompt": [scheduler_pb2.Segment(placeholder=3)]}, Reason.UNSUPPORTED),
        ({"task": scheduler_pb2.TASK_EMBED}, Reason.UNSUPPORTED),
        ({"grammar": common_pb2.Grammar(regex="a")}, Reason.UNSUPPORTED),  # this worker does not claim it
        ({"grammar": common_pb2.Grammar()}, Reason.INVALID_ARGUMENT),
        ({"grammar": common_pb2.Grammar(regex="a" * 300_000)}, Reason.INVALID_ARGUMENT),
        ({"adapter": "a"}, Reason.UNSUPPORTED),
        ({"sampling": common_pb2.SamplingSpec(max_tokens=0)}, Reason.INVALID_ARGUMENT),
        ({"digest": b"x" * 32}, Reason.MODEL_CHANGED),
        ({"digest": b"x" * 32, "output_token_ids": pack([1], np.int32)}, Reason.NO_WORKER),
        ({"sampling": sampling(temperature=float("nan"))}, Reason.INVALID_ARGUMENT),
        ({"sampling": sampling(top_p=0)}, Reason.INVALID_ARGUMENT),
        ({"sampling": sampling(top_k=2**31)}, Reason.INVALID_ARGUMENT),
        ({"sampling": sampling(logprobs=2**32 - 1)}, Reason.INVALID_ARGUMENT),
        ({"sampling": sampling(frequency_penalty=3)}, Reason.INVALID_ARGUMENT),
        ({"sampling": sampling(bad_words=[common_pb2.TokenSequence()])}, Reason.INVALID_ARGUMENT),
        ({"sampling": sampling(logit_bias={1: float("inf")})}, Reason.INVALID_ARGUMENT),
        # Ids that end a sequence are a column for all rows: its width is the longest list.
        ({"sampling": sampling(stop_token_ids=pack([1] * 513, np.int32))}, Reason.INVALID_ARGUMENT),
    ],
)
def test_each_bad_submit_fails_alone_with_its_reason(cluster: Cluster, wrong: dict[str, Any], reason: Reason) -> None:
    cluster.say(submit=submit(1, **wrong))
    cluster.say(submit=submit(2))
    assert failures(cluster.from_router()) == [(1, reason)]
    assert len(cluster.plans()[0].new_rows) == 1


def test_too_long_and_duplicate_are_refused(cluster: Cluster) -> None:
    cluster.say(submit=submit(1, length=64))
    cluster.say(submit=submit(2))
    cluster.say(submit=submit(2))
    assert failures(cluster.from_router()) == [(1, Reason.PROMPT_TOO_LONG), (2, Reason.DUPLICATE_REQUEST)]


def test_a_full_queue_says_when_to_come_again() -> None:
    cluster = Cluster(core=Settings(max_waiting_requests=1))
    cluster.say(submit=submit(1))
    cluster.say(submit=submit(2))
    (refused,) = [m.failed for m in cluster.from_router() if m.HasField("failed")]
    assert refused.reason == Reason.QUEUE_FULL
    assert refused.retry_after_ms > 0


def test_cancel_is_acknowledged_even_for_an_unknown_handle(cluster: Cluster) -> None:
    cluster.say(submit=submit(1))
    cluster.plans()
    cluster.from_router()
    cluster.say(cancel=scheduler_pb2.Cancel(handle=1))
    cluster.say(cancel=scheduler_pb2.Cancel(handle=5))
    assert [m.cancelled.handle for m in cluster.from_router()] == [1, 5]
    assert cluster.hub.core.load().running == 0


def test_a_lost_worker_gives_its_requests_back_and_another_goes_on(cluster: Cluster) -> None:
    cluster.say(submit=submit(1))
    (first, *_) = cluster.plans()
    cluster.answer(first, token=40)
    cluster.from_router()
    second = cluster.enlist(hello(2))
    cluster.hub.worker_gone(cluster.worker, 0.0)
    cluster.worker = second
    (plan, *_) = cluster.plans()
    assert unpack("", plan.new_rows[0].token_ids, np.int32).tolist() == [20, 21, 22, 23, 24, 40]
    assert plan.new_rows[0].num_prompt_tokens == 5
    cluster.answer(plan, token=41)
    (batch,) = [m.tokens for m in cluster.from_router() if m.HasField("tokens")]
    assert unpack("", batch.first_output_index, np.int32).tolist() == [1]


def test_a_failed_step_is_computed_again(cluster: Cluster) -> None:
    cluster.say(submit=submit(1))
    (plan, *_) = cluster.plans()
    cluster.answer(plan, status=step_pb2.STEP_STATUS_FAILED, num_tokens=b"", token_ids=b"")
    assert cluster.worker.cut is not None
    assert not [plan for plan in cluster.plans() if plan.new_rows]
    cluster.hub.worker_gone(cluster.worker, 0.0)
    cluster.worker = cluster.enlist(hello(1))
    assert len(cluster.plans()[0].new_rows) == 1
    assert failures(cluster.from_router()) == []


def test_token_ids_are_checked_against_the_vocabulary_of_the_digest_that_runs_them(cluster: Cluster) -> None:
    other = b"o" * 32
    cluster.enlist(hello(2, model="small", model_digest=other, vocab_size=50))
    cluster.from_router()
    # A resume may name any digest; its model's name here is that of the larger vocabulary.
    cluster.say(submit=submit(1, digest=other, output_token_ids=pack([999], np.int32)))
    assert failures(cluster.from_router()) == [(1, Reason.INVALID_ARGUMENT)]


def test_a_router_that_does_not_read_is_cut(cluster: Cluster) -> None:
    for _ in range(70_000):
        cluster.router.put(scheduler_pb2.AttachResponse(load=scheduler_pb2.Load()))
    assert cluster.router.cut is not None
    assert cluster.router.cut.reason is Reason.SLOW_CONSUMER


def test_a_draining_scheduler_accepts_nothing(cluster: Cluster) -> None:
    cluster.hub.begin_drain(1000)
    cluster.say(submit=submit(1))
    messages = cluster.from_router()
    assert messages[0].WhichOneof("message") == "go_away"
    assert failures(messages) == [(1, Reason.DRAINING)]
    with pytest.raises(OctavoError):
        cluster.hub.enlist(hello(2), 0.0)


def test_deadlines_end_requests(cluster: Cluster) -> None:
    cluster.say(submit=submit(1, remaining_ms=50))
    cluster.plans()
    cluster.hub.tick(0.1)
    assert failures(cluster.from_router()) == [(1, Reason.DEADLINE)]


def test_an_inspector_sees_rows_and_then_only_changes(cluster: Cluster) -> None:
    cluster.say(submit=submit(1, priority=3))
    cluster.plans()
    request = scheduler_pb2.InspectRequest(rows=True)
    first = inspect(cluster.hub, request, 5)
    (row,) = first.workers[0].rows
    assert (row.num_prompt_tokens, row.num_computed, row.priority) == (5, 6, 3)
    assert len(row.block_ids) == 2 * 4
    assert first.queue.running == 1
    assert not only_changes(inspect(cluster.hub, request, 6), first).workers
    assert list_workers(cluster.hub)[0].blocks_used == 2
    cluster.hub.worker_gone(cluster.worker, 0.0)
    assert only_changes(inspect(cluster.hub, request, 7), first).gone == [1]


def test_load_is_told_each_heartbeat_whatever_else_is_said() -> None:
    cluster = Cluster()
    told = 0
    for tick in range(1, 41):
        now = tick * 0.025
        cluster.say(now, submit=submit(tick, max_tokens=1))
        cluster.hub.plan(now)
        cluster.hub.tick(now)
        told += sum(message.HasField("load") for message in cluster.from_router())
        cluster.worker.heard_at = now
    assert 10 <= told <= 14
