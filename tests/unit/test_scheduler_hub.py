"""The scheduler's session logic: epochs, leases, guards, delivery. The core below it is the real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from octavo.v1 import common_pb2, scheduler_pb2, step_pb2

from scheduler.core import Settings
from scheduler.hub import Hub, HubSettings
from scheduler.inspect import inspect, list_workers, only_changes
from scheduler.peers import Pace, RouterPeer, WorkerPeer
from service.columns import pack, unpack
from service.errors import OctavoError, Reason

DIGEST = b"d" * 32


def hello(incarnation: int = 1, **more: Any) -> scheduler_pb2.WorkerHello:
    fields: dict[str, Any] = {
        "incarnation": incarnation,
        "protocol": 1,
        "model": "m",
        "model_digest": DIGEST,
        "vocab_size": 1000,
        "max_model_len": 64,
        "max_rows": 4,
        "max_num_batched_tokens": 32,
        "kv_groups": [scheduler_pb2.KvGroup(id=0, block_size=4, num_blocks=64)],
        "hash_version": 1,
        "name": f"w{incarnation}",
    }
    return scheduler_pb2.WorkerHello(**(fields | more))


def sampling(**more: Any) -> common_pb2.SamplingSpec:
    fields: dict[str, Any] = {"max_tokens": 3, "top_p": 1, "repetition_penalty": 1}
    return common_pb2.SamplingSpec(**(fields | more))


def submit(handle: int = 1, length: int = 5, max_tokens: int = 3, **more: Any) -> scheduler_pb2.Submit:
    fields: dict[str, Any] = {
        "handle": handle,
        "task": scheduler_pb2.TASK_GENERATE,
        "model": "m",
        "prompt": [scheduler_pb2.Segment(token_ids=pack(np.arange(length) + 20 * handle, np.int32))],
        "num_prompt_tokens": length,
        "sampling": sampling(max_tokens=max_tokens),
    }
    return scheduler_pb2.Submit(**(fields | more))


class Cluster:
    """A hub with one router and one worker whose assets have come."""

    def __init__(self, **settings: Any) -> None:
        self.hub = Hub(HubSettings(**settings), incarnation=9, first_epoch=100)
        self.router = self.hub.attach(scheduler_pb2.RouterHello(incarnation=3, protocol=1, name="r"), 0.0)
        self.worker = self.enlist(hello())
        self.from_router()
        self.from_worker()

    def enlist(self, hello: scheduler_pb2.WorkerHello, now: float = 0.0) -> WorkerPeer:
        worker = self.hub.enlist(hello, now)
        if worker.incoming is not None:
            chunk = common_pb2.AssetChunk(name="config.json", size=2, data=b"{}")
            self.say_worker(worker, asset=chunk)
            self.say_worker(worker, assets_end=scheduler_pb2.AssetsEnd(digest=hello.model_digest))
        return worker

    def say(self, now: float = 0.0, **message: Any) -> None:
        self.hub.on_router(self.router, scheduler_pb2.AttachRequest(epoch=self.router.epoch, **message), now)

    def say_worker(self, worker: WorkerPeer | None = None, now: float = 0.0, **message: Any) -> None:
        worker = worker or self.worker
        self.hub.on_worker(worker, scheduler_pb2.EnlistRequest(epoch=worker.epoch, **message), now)

    def answer(self, plan: step_pb2.StepPlan, token: int = 42, now: float = 0.0, **more: Any) -> None:
        samples = int(unpack("", plan.num_samples, np.uint8).sum())
        fields: dict[str, Any] = {
            "epoch": plan.epoch,
            "step_id": plan.step_id,
            "status": step_pb2.STEP_STATUS_OK,
            "num_tokens": bytes([1] * samples),
            "token_ids": pack([token] * samples, np.int32),
        }
        self.say_worker(now=now, result=step_pb2.StepResult(**(fields | more)))

    def from_router(self, router: RouterPeer | None = None) -> list[scheduler_pb2.AttachResponse]:
        peer = router or self.router
        return list(iter(lambda: peer.take(0.0), None))

    def from_worker(self, worker: WorkerPeer | None = None) -> list[scheduler_pb2.EnlistResponse]:
        peer = worker or self.worker
        return list(iter(lambda: peer.take(0.0), None))

    def plans(self, now: float = 0.0) -> list[step_pb2.StepPlan]:
        while self.hub.plan(now):
            pass
        return [message.plan for message in self.from_worker() if message.HasField("plan")]


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def failures(messages: list[scheduler_pb2.AttachResponse]) -> list[tuple[int, int]]:
    return [(m.failed.handle, m.failed.reason) for m in messages if m.HasField("failed")]


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


def test_routers_and_operators_hear_how_a_model_is_quantised(cluster: Cluster) -> None:
    cluster.enlist(hello(2, model="q", model_digest=b"q" * 32, quantization="int8"))
    lists = [message.models for message in cluster.from_router() if message.HasField("models")]
    assert {model.name: model.quantization for model in lists[-1].models} == {"m": "", "q": "int8"}
    assert [status.quantization for status in list_workers(cluster.hub)] == ["", "int8"]


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


def test_results_that_answer_no_plan_cut_the_worker(cluster: Cluster) -> None:
    cluster.say(submit=submit(1))
    (plan, *_) = cluster.plans()
    for lie in ({"step_id": 9}, {"token_ids": b""}, {"token_ids": pack([1000], np.int32)}, {"epoch": 1}):
        with pytest.raises(OctavoError) as caught:
            cluster.answer(plan, **lie)
        assert caught.value.reason is Reason.PROTOCOL_VIOLATION
    cluster.answer(plan)  # nothing was changed by the lies


@pytest.mark.parametrize(
    "lie",
    [
        {"num_entries": pack([-1], np.int32)},
        {"num_entries": pack([3], np.int32)},
        {"token_ids": pack([42, 1000], np.int32)},
        {"position": pack([-6], np.int32)},
        {"rank": pack([0], np.int32)},
        {"owner": b"abc"},
    ],
)
def test_lying_logprobs_cut_the_worker_before_its_tokens_are_booked(cluster: Cluster, lie: dict[str, bytes]) -> None:
    cluster.say(submit=submit(1, max_tokens=1))
    (plan, *_) = cluster.plans()
    fields = {
        "owner": pack([0], np.int32),
        "position": pack([5], np.int32),
        "rank": pack([1], np.int32),
        "num_entries": pack([2], np.int32),
        "token_ids": pack([42, 43], np.int32),
        "logprobs": pack([-0.5, -1.5], np.float32),
    }
    with pytest.raises(OctavoError) as caught:
        cluster.answer(plan, logprobs=common_pb2.LogprobColumns(**(fields | lie)))
    assert caught.value.reason is Reason.PROTOCOL_VIOLATION
    cluster.answer(plan, logprobs=common_pb2.LogprobColumns(**fields))
    (batch,) = [m.tokens for m in cluster.from_router() if m.HasField("tokens")]
    assert batch.finish_reason == bytes([common_pb2.FINISH_REASON_LENGTH])


@pytest.mark.parametrize(
    "lie",
    [
        {"max_rows": 2**31 - 1, "max_num_batched_tokens": 2**31 - 1},
        {"max_rows": 60_000, "max_num_batched_tokens": 60_000, "max_model_len": 2**31 - 1},
        {"kv_groups": [scheduler_pb2.KvGroup(id=0, block_size=4, num_blocks=2**31 - 1)]},
        {"vocab_size": 2**31},
    ],
)
def test_a_worker_that_claims_to_be_huge_is_refused(cluster: Cluster, lie: dict[str, Any]) -> None:
    with pytest.raises(OctavoError) as caught:
        cluster.enlist(hello(2, model="huge", model_digest=b"h" * 32, **lie))
    assert caught.value.reason is Reason.INVALID_ARGUMENT


def test_tables_that_do_not_fit_in_memory_refuse_the_worker(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("scheduler.core.state.Rows", no_memory)
    with pytest.raises(OctavoError) as caught:
        cluster.enlist(hello(2))
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert list(cluster.hub.workers.values()) == [cluster.worker]


def test_token_ids_are_checked_against_the_vocabulary_of_the_digest_that_runs_them(cluster: Cluster) -> None:
    other = b"o" * 32
    cluster.enlist(hello(2, model="small", model_digest=other, vocab_size=50))
    cluster.from_router()
    # A resume may name any digest; its model's name here is that of the larger vocabulary.
    cluster.say(submit=submit(1, digest=other, output_token_ids=pack([999], np.int32)))
    assert failures(cluster.from_router()) == [(1, Reason.INVALID_ARGUMENT)]


def test_the_vocabulary_of_a_digest_in_use_is_settled(cluster: Cluster) -> None:
    with pytest.raises(OctavoError, match="vocab_size"):
        cluster.enlist(hello(2, vocab_size=10))
    cluster.say(submit=submit(1))
    cluster.hub.worker_gone(cluster.worker, 0.0)
    with pytest.raises(OctavoError, match="vocab_size"):
        cluster.enlist(hello(2, vocab_size=10))  # the request that waits was checked against 1,000
    cluster.enlist(hello(2))


@pytest.mark.parametrize("names", [["n" * 256], [f"f{number}" for number in range(65)]])
def test_asset_names_are_bounded(cluster: Cluster, names: list[str]) -> None:
    worker = cluster.hub.enlist(hello(2, model="other", model_digest=b"o" * 32), 0.0)
    with pytest.raises(OctavoError, match="asset files"):
        for name in names:
            cluster.say_worker(worker, asset=common_pb2.AssetChunk(name=name))


def test_assets_of_models_that_are_gone_do_not_pile_up(cluster: Cluster) -> None:
    digests = [bytes([number]) * 32 for number in range(20)]
    for digest in digests:
        worker = cluster.enlist(hello(2, model=f"m{digest[0]}", model_digest=digest))
        cluster.hub.worker_gone(worker, 0.0)
    assert DIGEST in cluster.hub.assets
    assert [digest in cluster.hub.assets for digest in digests] == [False] * 15 + [True] * 5


def test_messages_of_another_epoch_cut_the_stream(cluster: Cluster) -> None:
    with pytest.raises(OctavoError, match="epoch"):
        cluster.hub.on_router(cluster.router, scheduler_pb2.AttachRequest(epoch=1, submit=submit()), 0.0)
    with pytest.raises(OctavoError, match="epoch"):
        message = scheduler_pb2.EnlistRequest(epoch=1, heartbeat=scheduler_pb2.WorkerHeartbeat())
        cluster.hub.on_worker(cluster.worker, message, 0.0)


def test_a_worker_that_comes_again_fences_its_old_stream_off(cluster: Cluster) -> None:
    cluster.say(submit=submit(1))
    cluster.plans()
    again = cluster.enlist(hello(1))
    assert cluster.worker.cut is not None
    assert list(cluster.hub.workers.values()) == [again]
    cluster.hub.worker_gone(cluster.worker, 0.0)  # the old stream's end changes nothing any more
    cluster.worker = again
    assert len(cluster.plans()[0].new_rows) == 1


def test_a_second_digest_needs_admission(cluster: Cluster) -> None:
    other = hello(2, model_digest=b"e" * 32)
    with pytest.raises(OctavoError) as caught:
        cluster.hub.enlist(other, 0.0)
    assert caught.value.reason is Reason.MODEL_CHANGED
    cluster.hub.admit_digest("m", b"e" * 32)
    cluster.enlist(other)
    assert {model.digest for model in cluster.hub.served_models()} == {DIGEST, b"e" * 32}


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": 2},
        {"model_digest": b"short"},
        {"max_num_batched_tokens": 3},
        {"kv_groups": []},
        {"vocab_size": 0},
        {"kv_groups": [scheduler_pb2.KvGroup(id=0, block_size=0, num_blocks=4)]},
    ],
)
def test_an_impossible_hello_is_refused(cluster: Cluster, wrong: dict[str, Any]) -> None:
    with pytest.raises(OctavoError):
        cluster.hub.enlist(hello(2, **wrong), 0.0)
    assert len(cluster.hub.workers) == 1


def test_silence_ends_a_lease_but_not_after_our_own_stall(cluster: Cluster) -> None:
    hub = cluster.hub
    hub.tick(0.1)
    assert [m.WhichOneof("message") for m in cluster.from_worker()] == ["heartbeat"]
    assert [m.WhichOneof("message") for m in cluster.from_router()] == ["load"]
    hub.tick(5.0)  # we stalled: nobody is judged yet
    assert cluster.worker.cut is None
    cluster.say_worker(now=5.0, heartbeat=scheduler_pb2.WorkerHeartbeat())
    hub.tick(5.1)
    assert cluster.worker.cut is None
    assert cluster.router.cut is not None


def test_a_hung_device_is_found_though_its_heartbeats_come(cluster: Cluster) -> None:
    pace = Pace()
    for step_id in range(1, 6):
        pace.planned(step_id, 1, step_id * 1.0)
        pace.returned(step_id, step_id * 1.0 + 0.01)
    pace.planned(6, 1, 10.0)
    assert pace.overdue(11.9) == 0
    assert pace.overdue(12.2) > 0
    pace.returned(6, 12.3)
    pace.planned(7, 1000, 20.0)  # a thousand tokens may take a hundred times as long
    assert pace.overdue(25.0) == 0


def test_a_router_that_does_not_read_is_cut(cluster: Cluster) -> None:
    for _ in range(70_000):
        cluster.router.put(scheduler_pb2.AttachResponse(load=scheduler_pb2.Load()))
    assert cluster.router.cut is not None
    assert cluster.router.cut.reason is Reason.SLOW_CONSUMER


def test_a_draining_worker_ends_its_requests_and_is_let_go(cluster: Cluster) -> None:
    cluster.say(submit=submit(1, max_tokens=1))
    (plan, *_) = cluster.plans()
    cluster.say_worker(draining=scheduler_pb2.Draining())
    cluster.say(submit=submit(2))
    cluster.answer(plan)
    messages = cluster.from_worker()
    assert messages[-1].WhichOneof("message") == "go_away"
    assert cluster.worker.closing
    cluster.hub.plan(0.0)
    assert not [m for m in cluster.from_worker() if m.plan.new_rows]


def test_a_draining_scheduler_accepts_nothing(cluster: Cluster) -> None:
    cluster.hub.begin_drain(1000)
    cluster.say(submit=submit(1))
    messages = cluster.from_router()
    assert messages[0].WhichOneof("message") == "go_away"
    assert failures(messages) == [(1, Reason.DRAINING)]
    with pytest.raises(OctavoError):
        cluster.hub.enlist(hello(2), 0.0)


def test_a_worker_gets_its_plans_one_at_a_time_so_that_the_first_can_leave(cluster: Cluster) -> None:
    cluster.say(submit=submit(1))
    cluster.from_worker()
    assert cluster.hub.plan(0.0), "another can follow"
    assert [message.plan.step_id for message in cluster.from_worker()] == [1]
    assert not cluster.hub.plan(0.0), "two are in flight"
    assert [message.plan.step_id for message in cluster.from_worker()] == [2]


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


def test_assets_of_models_that_nobody_holds_any_more_do_not_pile_up() -> None:
    cluster = Cluster()
    for number in range(20):
        digest = bytes([number]) * 32
        gone = cluster.enlist(hello(incarnation=100 + number, model=f"m{number}", model_digest=digest))
        assert digest in cluster.hub.assets
        cluster.hub.worker_gone(gone, 0.0)
    kept = [number for number in range(20) if bytes([number]) * 32 in cluster.hub.assets]
    assert kept == [15, 16, 17, 18, 19]  # the last was held when it came
    assert DIGEST in cluster.hub.assets
