"""Whole answers are put together while they come, in pieces, and only if they may fit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from octavo.v1 import common_pb2, inference_pb2

from router import collect
from router.collect import Collector, encoded, size_of
from service.columns import pack
from service.errors import Reason
from tests.unit.router_calls import IDS, Message, ask, refuse, say_text
from tests.unit.router_fakes import Say, cluster, tokens
from tests.unit.waiting import eventually

TOP, COUNT = 4, 40


def batch(message: Message, at: int, count: int, end: int = 0) -> Any:
    """Tokens with log-probabilities; before the first of them those of the prompt."""
    submit = message.submit
    positions = range(at + submit.num_prompt_tokens, at + count + submit.num_prompt_tokens)
    if at == 0:
        positions = range(1, count + submit.num_prompt_tokens)
    made = tokens(0, (submit.handle, at, [IDS[0]] * count, end))
    made.tokens.logprobs.CopyFrom(
        common_pb2.LogprobColumns(
            owner=pack([0] * len(positions), "int32"),
            position=pack(list(positions), "int32"),
            rank=pack([1] * len(positions), "int32"),
            num_entries=pack([1 + TOP] * len(positions), "int32"),
            token_ids=pack([300 + position % 7 for position in positions for _ in range(1 + TOP)], "int32"),
            logprobs=pack([-0.5] * len(positions) * (1 + TOP), "float32"),
        )
    )
    return made


async def all_at_once(message: Message, say: Say) -> None:
    if message.HasField("submit"):
        await say(batch(message, 0, COUNT, common_pb2.FINISH_REASON_LENGTH))


def whole() -> inference_pb2.CompleteRequest:
    return inference_pb2.CompleteRequest(
        request=ask("hello hello hello", logprobs=TOP, prompt_logprobs=TOP, max_tokens=COUNT, seed=5)
    )


def of(answer: inference_pb2.CompleteResponse) -> inference_pb2.CompleteResponse:
    answer.request_id = ""
    for output in answer.outputs:
        output.ClearField("timing")
    return answer


@pytest.mark.parametrize("piece_bytes", [1, 300, 1 << 20])
def test_the_size_of_the_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    async def main() -> None:
        async with cluster(all_at_once) as (_, router):
            monkeypatch.setattr(collect, "_PIECE_BYTES", 1 << 30)
            expected = of(await router.stub.Complete(whole()))
            monkeypatch.setattr(collect, "_PIECE_BYTES", piece_bytes)
            monkeypatch.setattr("router.service._LARGE_BYTES", 0)
            assert of(await router.stub.Complete(whole())) == expected
            (output,) = expected.outputs
            assert len(output.logprobs) == COUNT == len(output.token_ids) and len(output.logprobs[7].top) == TOP
            assert len(output.prompt_logprobs) == output.usage.prompt_tokens > 2
            assert not output.prompt_logprobs[0].HasField("token") and output.prompt_logprobs[2].token.token_id == 302

    asyncio.run(main())


def test_an_answer_grows_while_its_tokens_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its end there is little left to copy."""
    monkeypatch.setattr(collect, "_PIECE_BYTES", 4 * (8 + 32 * (1 + TOP)))
    queues: list[asyncio.Queue[int]] = []  # of each request: how many tokens come next

    async def slowly(message: Message, say: Say) -> None:
        async def speak() -> None:
            at, queue = 0, asyncio.Queue[int]()
            queues.append(queue)
            while True:
                count = await queue.get()
                await say(batch(message, at, count))
                at += count

        if message.HasField("submit"):
            tasks.append(asyncio.create_task(speak()))

    tasks: list[asyncio.Task[None]] = []

    async def main() -> None:
        async with cluster(slowly) as (_, router):
            prepared = await router.preparation.prepare(whole().request, "t", None)
            stream = router.hub.submit(prepared.request, bounded=False)
            answer = inference_pb2.CompleteResponse()
            collector = Collector(prepared.request, answer)
            await eventually(lambda: len(queues) == 1)
            queues[0].put_nowait(3)
            await eventually(lambda: prepared.request.num_buffered == 3)
            await collector.more()
            assert not answer.outputs[0].token_ids and prepared.request.num_buffered == 3  # not worth while
            queues[0].put_nowait(5)
            await eventually(lambda: prepared.request.num_buffered == 8)
            await collector.more()
            assert len(answer.outputs[0].logprobs) == 8 and prepared.request.num_buffered == 0
            assert len(answer.outputs[0].prompt_logprobs) == prepared.request.spec.num_prompt_tokens
            assert prepared.request.num_output_tokens == 8  # what was taken still counts for the bound
            router.hub.close(stream, 0)
            # And so it is with a call.
            running = router.stub.Complete(whole())
            await eventually(lambda: len(queues) == 2)
            (request,) = router.session.requests()
            queues[1].put_nowait(9)
            await eventually(lambda: request.num_output_tokens == 9 and request.num_buffered == 0)
            running.cancel()
            await eventually(lambda: router.session.num_requests == 0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    asyncio.run(main())


def test_others_have_their_turn_while_an_answer_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_PIECE_BYTES", 32 * (1 + TOP) * 10)
    answer = inference_pb2.CompleteResponse(request_id="r", model="m", digest="d", seed=2**63)
    for index in range(3):
        output = answer.outputs.add(index=index, text="é" * 500, token_ids=range(200))
        output.finish_reason = common_pb2.FINISH_REASON_STOP
        output.stop_match.token_id = 0
        output.usage.prompt_tokens = 3
        for _ in range(200 * index):
            entry = output.logprobs.add()
            entry.token.rank = 1
            for rank in range(TOP):
                entry.top.add(rank=rank, text="x")
    turns = 0

    async def main() -> None:
        async def other() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        task = asyncio.create_task(other())
        data = await encoded(answer)
        task.cancel()
        again = inference_pb2.CompleteResponse.FromString(data)
        assert again == answer and [one.HasField("stop_match") for one in again.outputs] == [True] * 3

    asyncio.run(main())
    assert turns >= 600 // 10
    assert size_of(answer) > 600 * 32 * (1 + TOP)


def test_what_may_become_too_large_is_refused_before_it_is_made() -> None:
    async def main() -> None:
        async with cluster(say_text) as (scheduler, router):
            for fields, field in (
                ({"n": 64, "logprobs": 20, "max_tokens": 400}, "sampling.logprobs"),
                ({"n": 64, "max_tokens": 40_000}, "sampling.max_tokens"),
            ):
                request = inference_pb2.CompleteRequest(request=ask(**fields))
                error = await refuse(router.stub.Complete(request))
                assert error.reason is Reason.INVALID_ARGUMENT and error.violations[0].field == field
                assert str(16 << 20) in error.violations[0].description
            assert not scheduler.submits()
            assert (await router.stub.Complete(inference_pb2.CompleteRequest(request=ask(max_tokens=400)))).outputs

    asyncio.run(main())
