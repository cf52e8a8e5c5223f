"""The worker's session and its column checks: what a scheduler may say, and what is refused before it reaches the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from octavo.v1 import common_pb2, scheduler_pb2, step_pb2

from service.columns import pack
from service.errors import OctavoError, Reason
from service.grammar import Grammar
from worker.backend import BackendInfo, KVGroup
from worker.session import Execute, Identity, Leave, WorkerSession
from worker.step import StepOutput

INFO = BackendInfo("mock", "n", "uint64", 1000, 64, 4, 32, (KVGroup(0, 4, 10, 1, None),))


def i32(*values: int) -> bytes:
    return pack(values, np.int32)


def u8(*values: int) -> bytes:
    return pack(values, np.uint8)


def sampling(**more: Any) -> common_pb2.SamplingSpec:
    fields: dict[str, Any] = {"top_p": 1, "repetition_penalty": 1}
    return common_pb2.SamplingSpec(**(fields | more))


def new_row(
    row: int = 0, tokens: int = 6, computed: int = 0, blocks: tuple[int, ...] = (1, 2), **more: Any
) -> step_pb2.NewRow:
    fields: dict[str, Any] = {
        "row": row,
        "token_ids": i32(*range(tokens)),
        "num_prompt_tokens": tokens,
        "num_computed": computed,
        "block_ids": i32(*blocks),
        "sampling": sampling(),
    }
    return step_pb2.NewRow(**(fields | more))


def plan(step_id: int = 1, epoch: int = 7, **fields: Any) -> scheduler_pb2.EnlistResponse:
    return scheduler_pb2.EnlistResponse(epoch=epoch, plan=step_pb2.StepPlan(epoch=epoch, step_id=step_id, **fields))


def prefill(**more: Any) -> scheduler_pb2.EnlistResponse:
    fields: dict[str, Any] = {"new_rows": [new_row()], "rows": i32(0), "num_scheduled": i32(6), "num_samples": u8(1)}
    return plan(**(fields | more))


def welcome(epoch: int = 7, **more: Any) -> scheduler_pb2.EnlistResponse:
    fields: dict[str, Any] = {"protocol": 1, "run_ahead": 2, "heartbeat_ms": 100, "lease_ms": 300}
    return scheduler_pb2.EnlistResponse(epoch=epoch, welcome=scheduler_pb2.WorkerWelcome(**(fields | more)))


@pytest.fixture
def session() -> WorkerSession:
    hello = scheduler_pb2.WorkerHello(incarnation=5, model="m", model_digest=b"d" * 32)
    session = WorkerSession(Identity(hello, INFO, {"a": b"x" * 3_000_000, "empty": b""}))
    assert session.connected(0.0).hello == hello
    return session


@pytest.fixture
def enlisted(session: WorkerSession) -> WorkerSession:
    assert list(session.on_message(welcome(), 0.0)) == []
    return session


def output(step_id: int, tokens: int = 1) -> StepOutput:
    ones = np.ones(tokens, np.int32)
    return StepOutput(step_id, ones, ones * 0, ones * 42, None, 10, 20)


def test_a_plan_becomes_a_step_and_its_output_a_result(enlisted: WorkerSession) -> None:
    (action,) = enlisted.on_message(prefill(), 1.0)
    assert isinstance(action, Execute)
    assert action.step.rows.tolist() == [0]
    assert action.step.new_rows[0].token_ids.tolist() == [0, 1, 2, 3, 4, 5]
    message = enlisted.on_output(7, output(1), 1.0)
    assert message is not None
    assert message.result.token_ids == i32(42)
    assert message.result.num_tokens == u8(1)


@pytest.mark.parametrize(
    ("capabilities", "grammar", "problem"),
    [
        (["grammar"], common_pb2.Grammar(regex="a+"), ""),
        ([], common_pb2.Grammar(regex="a+"), "was not claimed"),
        (["grammar"], common_pb2.Grammar(), "must be one of"),
        (["grammar"], common_pb2.Grammar(lark="x" * 300_000), "at most"),
    ],
)
def test_a_grammar_comes_with_its_row(capabilities: list[str], grammar: common_pb2.Grammar, problem: str) -> None:
    hello = scheduler_pb2.WorkerHello(incarnation=5, model="m", model_digest=b"d" * 32, capabilities=capabilities)
    session = WorkerSession(Identity(hello, INFO, {}))
    session.connected(0.0)
    list(session.on_message(welcome(), 0.0))
    message = prefill(new_rows=[new_row(grammar=grammar, sampling=sampling(min_tokens=2))])
    if problem:
        with pytest.raises(OctavoError, match=problem):
            list(session.on_message(message, 1.0))
        return
    (action,) = session.on_message(message, 1.0)
    assert isinstance(action, Execute)
    (row,) = action.step.new_rows
    assert row.grammar == Grammar("regex", "a+")
    assert (row.sampling.min_tokens, row.sampling_after_mask.min_tokens) == (2, 0)


def test_a_decode_needs_no_token_and_no_block_until_one_is_full(enlisted: WorkerSession) -> None:
    list(enlisted.on_message(prefill(), 0.0))
    decode = {"rows": i32(0), "num_scheduled": i32(1), "num_samples": u8(1)}
    for step_id in (2, 3):
        list(enlisted.on_message(plan(step_id, **decode), 0.0))
    # Two blocks of four are full now: the next token needs a third.
    with pytest.raises(OctavoError, match="behind its last block"):
        list(enlisted.on_message(plan(4, **decode), 0.0))


@pytest.mark.parametrize(
    ("fields", "column"),
    [
        ({"rows": b"\x00\x00\x00"}, "rows"),
        ({"rows": i32(4)}, "rows"),
        ({"rows": i32(-1)}, "rows"),
        ({"rows": i32(1)}, "rows"),  # holds no request
        ({"num_scheduled": i32(6, 6)}, "num_scheduled"),
        ({"num_scheduled": i32(0)}, "num_scheduled"),
        ({"num_scheduled": i32(7)}, "num_scheduled"),  # more than it knows
        ({"num_samples": u8(2)}, "num_samples"),
        ({"num_scheduled": i32(5)}, "num_samples"),  # samples before its last token
        ({"num_samples": b""}, "num_samples"),
        ({"freed_rows": i32(9)}, "freed_rows"),
        ({"append_rows": i32(0)}, "append_block_ids"),
        ({"append_rows": i32(0), "append_block_ids": i32(10)}, "append_block_ids"),
        ({"append_rows": i32(3), "append_block_ids": i32(1)}, "append_rows"),
        ({"append_rows": i32(*[0] * 15), "append_block_ids": i32(*[1] * 15)}, "append_rows"),
        ({"append_rows": i32(0), "append_block_ids": i32(1), "append_kv_groups": u8(1)}, "append_kv_groups"),
        ({"chunk_rows": i32(0), "chunk_lens": i32(2), "chunk_token_ids": i32(1)}, "chunk_token_ids"),
        ({"chunk_rows": i32(0, 0), "chunk_lens": i32(1, 1), "chunk_token_ids": i32(1, 1)}, "chunk_rows"),
        ({"chunk_rows": i32(0), "chunk_lens": i32(60), "chunk_token_ids": i32(*[1] * 60)}, "chunk_lens"),
        ({"chunk_rows": i32(0), "chunk_lens": i32(1), "chunk_token_ids": i32(1000)}, "chunk_token_ids"),
        ({"draft_token_ids": i32(1)}, "num_draft_tokens"),
        ({"new_rows": [new_row(row=4)]}, "new_rows.row"),
        ({"new_rows": [new_row(), new_row()]}, "new_rows.row"),
        ({"new_rows": [new_row(computed=6)]}, "new_rows.token_ids"),
        ({"new_rows": [new_row(tokens=65)]}, "new_rows.token_ids"),
        ({"new_rows": [new_row(blocks=(1, 10))]}, "new_rows.block_ids"),
        ({"new_rows": [new_row(blocks=(1,))]}, "num_scheduled"),  # writes behind its last block
        ({"new_rows": [new_row(token_ids=i32(1, 2, 3, 4, 5, 1000))]}, "new_rows.token_ids"),
        ({"new_rows": [new_row(num_prompt_tokens=0)]}, "new_rows.num_prompt_tokens"),
        # samples a token beyond the context, where the next row's begin
        ({"new_rows": [new_row(tokens=64, computed=63, blocks=(1,) * 16)], "num_scheduled": i32(1)}, "num_samples"),
        ({"new_rows": [new_row(sampling=sampling(temperature=float("nan")))]}, "temperature"),
        ({"new_rows": [new_row(sampling=sampling(temperature=float("inf")))]}, "temperature"),
        ({"new_rows": [new_row(sampling=sampling(top_p=0))]}, "top_p"),
        ({"new_rows": [new_row(sampling=sampling(top_k=2**31))]}, "top_k"),
        ({"new_rows": [new_row(sampling=sampling(min_tokens=2**31))]}, "min_tokens"),
        ({"new_rows": [new_row(sampling=sampling(repetition_penalty=-1))]}, "repetition_penalty"),
        ({"new_rows": [new_row(sampling=sampling(presence_penalty=float("nan")))]}, "presence_penalty"),
        ({"new_rows": [new_row(sampling=sampling(logprobs=2**32 - 1))]}, "logprobs"),
        ({"new_rows": [new_row(sampling=sampling(prompt_logprobs=21))]}, "prompt_logprobs"),
        ({"new_rows": [new_row(sampling=sampling(bad_words=[common_pb2.TokenSequence()]))]}, "bad_words"),
        ({"new_rows": [new_row(sampling=sampling(logit_bias={1: float("nan")}))]}, "logit_bias"),
        ({"new_rows": [new_row(sampling=sampling(stop_token_ids=i32(*[1] * 513)))]}, "stop_token_ids"),
        (
            {"new_rows": [new_row(sampling=sampling(stop_token_ids=i32(1000)))]},
            "stop_token_ids",
        ),
        (
            {"new_rows": [new_row(sampling=sampling(logit_bias={1000: 1.0}))]},
            "logit_bias",
        ),
    ],
)
def test_a_lying_column_is_refused_by_name(enlisted: WorkerSession, fields: dict[str, Any], column: str) -> None:
    with pytest.raises(OctavoError) as caught:
        list(enlisted.on_message(prefill(**fields), 0.0))
    assert caught.value.reason is Reason.PROTOCOL_VIOLATION
    assert f"column {column}:" in caught.value.message


def test_more_than_the_budget_is_refused(enlisted: WorkerSession) -> None:
    rows = [new_row(row, tokens=9, blocks=(1, 2, 3)) for row in range(4)]
    fields = {"rows": i32(0, 1, 2, 3), "num_scheduled": i32(9, 9, 9, 9), "num_samples": u8(1, 1, 1, 1)}
    with pytest.raises(OctavoError, match="budget of 32"):
        list(enlisted.on_message(prefill(new_rows=rows, **fields), 0.0))


def test_steps_must_be_contiguous(enlisted: WorkerSession) -> None:
    with pytest.raises(OctavoError, match=r"plan 7\.2 where 7\.1 belongs"):
        list(enlisted.on_message(plan(2), 0.0))


def test_what_carries_another_epoch_is_dropped(enlisted: WorkerSession) -> None:
    assert list(enlisted.on_message(plan(1, epoch=6), 0.0)) == []
    list(enlisted.on_message(prefill(), 0.0))
    enlisted.disconnected()
    assert enlisted.on_output(7, output(1), 0.0) is None


def test_a_new_stream_forgets_every_row(enlisted: WorkerSession) -> None:
    list(enlisted.on_message(prefill(), 0.0))
    enlisted.disconnected()
    enlisted.connected(1.0)
    list(enlisted.on_message(welcome(8), 1.0))
    (action,) = enlisted.on_message(prefill(epoch=8), 1.0)
    assert isinstance(action, Execute)
    assert action.epoch == 8


def test_nothing_may_come_before_the_welcome(session: WorkerSession) -> None:
    with pytest.raises(OctavoError, match="before the welcome"):
        list(session.on_message(plan(1), 0.0))
    with pytest.raises(OctavoError) as caught:
        list(session.on_message(welcome(protocol=2), 0.0))
    assert caught.value.reason is Reason.PROTOCOL_MISMATCH


def test_heartbeats_fill_silence_and_a_silent_scheduler_is_left(enlisted: WorkerSession) -> None:
    assert [m.WhichOneof("message") for m in enlisted.tick(0.1)] == ["heartbeat"]  # type: ignore[union-attr]
    list(enlisted.on_message(prefill(), 0.15))
    enlisted.on_output(7, output(1), 0.19)
    assert list(enlisted.tick(0.2)) == []  # the result spoke already
    list(enlisted.tick(0.3))
    list(enlisted.tick(0.4))
    leaves = [action for action in enlisted.tick(0.5) if isinstance(action, Leave)]
    assert len(leaves) == 1


def test_after_its_own_stall_the_session_listens_before_it_judges(enlisted: WorkerSession) -> None:
    list(enlisted.tick(0.1))
    assert not [a for a in enlisted.tick(5.0) if isinstance(a, Leave)]
    list(enlisted.on_message(scheduler_pb2.EnlistResponse(epoch=7, heartbeat=scheduler_pb2.SchedulerHeartbeat()), 5.0))
    assert not [a for a in enlisted.tick(5.1) if isinstance(a, Leave)]


def test_assets_travel_in_pieces(enlisted: WorkerSession) -> None:
    request = scheduler_pb2.EnlistResponse(epoch=7, send_assets=scheduler_pb2.SendAssets(digest=b"d" * 32))
    messages = [m for m in enlisted.on_message(request, 0.0) if isinstance(m, scheduler_pb2.EnlistRequest)]
    assert [m.asset.name for m in messages] == ["a", "", "", "empty", ""]
    assert b"".join(m.asset.data for m in messages[:3]) == b"x" * 3_000_000
    assert messages[-1].WhichOneof("message") == "assets_end"


def test_a_failed_step_is_told_and_ends_the_epoch(enlisted: WorkerSession) -> None:
    list(enlisted.on_message(prefill(), 0.0))
    told, leave = enlisted.on_step_failed(7, 1, "boom")
    assert isinstance(told, scheduler_pb2.EnlistRequest)
    assert told.result.status == step_pb2.STEP_STATUS_FAILED
    assert isinstance(leave, Leave)
    assert list(enlisted.on_step_failed(6, 1, "of an earlier epoch")) == []


def test_draining_is_said_again_in_a_new_epoch(enlisted: WorkerSession) -> None:
    message = enlisted.drain()
    assert message is not None
    assert message.WhichOneof("message") == "draining"
    enlisted.disconnected()
    enlisted.connected(0.0)
    assert [m.WhichOneof("message") for m in enlisted.on_message(welcome(9), 0.0)] == ["draining"]  # type: ignore[union-attr]


def test_a_scheduler_that_never_welcomes_is_left(session: WorkerSession) -> None:
    assert list(session.tick(4.9)) == []
    (leave,) = session.tick(5.1)
    assert isinstance(leave, Leave) and not leave.for_good
