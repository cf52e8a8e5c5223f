"""Workers at the scheduler's hub: what they claim, their results, assets and epochs, and how they are fenced off or let go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from octavo.v1 import common_pb2, scheduler_pb2

from scheduler.inspect import list_workers
from scheduler.peers import Pace
from service.columns import pack
from service.errors import OctavoError, Reason
from tests.unit.hub_cluster import DIGEST, Cluster, hello, submit


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_routers_and_operators_hear_how_a_model_is_quantised(cluster: Cluster) -> None:
    cluster.enlist(hello(2, model="q", model_digest=b"q" * 32, quantization="int8"))
    lists = [message.models for message in cluster.from_router() if message.HasField("models")]
    assert {model.name: model.quantization for model in lists[-1].models} == {"m": "", "q": "int8"}
    assert [status.quantization for status in list_workers(cluster.hub)] == ["", "int8"]


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


def test_a_worker_gets_its_plans_one_at_a_time_so_that_the_first_can_leave(cluster: Cluster) -> None:
    cluster.say(submit=submit(1))
    cluster.from_worker()
    assert cluster.hub.plan(0.0), "another can follow"
    assert [message.plan.step_id for message in cluster.from_worker()] == [1]
    assert not cluster.hub.plan(0.0), "two are in flight"
    assert [message.plan.step_id for message in cluster.from_worker()] == [2]


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
