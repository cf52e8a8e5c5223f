"""A stream of several prompts: they run side by side, and one client reads them all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from octavo.v1 import common_pb2, inference_pb2

from router.http.stream import EventStream
from router.idempotency import Claim
from router.inference import Inference
from router.parking import Call
from service.errors import Reason
from tests.unit.http_door import Connection, Door, data_of, door
from tests.unit.router_calls import IDS, Message, ask, stay_silent
from tests.unit.router_fakes import Say, cluster, tokens
from tests.unit.waiting import eventually


async def stream(at: Door, prompts: list[str], **fields: Any) -> Connection:
    connection = await at.connect()
    await connection.send("POST", "/v1/completions", {"prompt": prompts, "stream": True} | fields)
    return connection


def test_prompts_that_wait_in_a_queue_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may take a moment before it is told as started; a head that waits for one after the other comes after many seconds."""
    inside, everyone, started = 0, asyncio.Event(), Inference.started

    async def together(inference: Inference, call: Call, beat: Any = None) -> inference_pb2.Started:
        nonlocal inside
        inside += 1
        if inside == 64:
            everyone.set()
        await everyone.wait()
        return await started(inference, call, beat)

    monkeypatch.setattr(Inference, "started", together)

    async def main() -> None:
        async with door(stay_silent) as (scheduler, at):
            connection = await stream(at, ["hello"] * 64)
            async with asyncio.timeout(10):
                assert (await connection.head())[0] == 200
            assert len(scheduler.submits()) == 64
            await connection.close()
            await eventually(lambda: at.router.session.num_requests == 0 and at.router.gate.num_inside == 0)

    asyncio.run(main())


async def flood(message: Message, say: Say) -> None:
    """300 tokens at once."""
    if message.HasField("submit"):
        for start in range(0, 300, 10):
            end = common_pb2.FINISH_REASON_LENGTH if start == 290 else 0
            await say(tokens(0, (message.submit.handle, start, [IDS[0]] * 10, end)))


def test_a_prompt_that_runs_while_another_is_waited_for_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads all the time: there is no head yet that it could read."""
    release, started = asyncio.Event(), Inference.started
    calls: list[Call] = []

    async def late(inference: Inference, call: Call, beat: Any = None) -> inference_pb2.Started:
        calls.append(call)
        await release.wait()
        return await started(inference, call, beat)

    monkeypatch.setattr(Inference, "started", late)

    async def main() -> None:
        async with door(flood, max_buffered_tokens=100) as (_, at):
            connection = await stream(at, ["hello", "world"], max_tokens=300)
            await eventually(lambda: len(calls) == 2 and all(call.request.done for call in calls))
            release.set()
            reply = await connection.reply()
            events = reply.body.decode().split("\n\n")[:-1]
            assert reply.status == 200 and events[-1] == "data: [DONE]"
            ends = [data_of(event)["choices"][0]["finish_reason"] for event in events[:-1]]
            assert sorted(end for end in ends if end) == ["length", "length"]
            await connection.close()

    asyncio.run(main())


def test_a_stream_that_waits_for_its_second_prompt_says_so() -> None:
    async def first_only(message: Message, say: Say) -> None:
        if message.HasField("submit") and message.submit.num_prompt_tokens == 2:
            await flood(message, say)

    async def main() -> None:
        async with door(first_only, keep_alive=0.05) as (_, at):
            connection = await stream(at, ["hello", "hello hello hello"], max_tokens=300)
            await connection.head()
            events = connection.events()
            async with asyncio.timeout(10):
                while '"finish_reason":"length"' not in await anext(events):
                    pass
                for _ in range(3):
                    assert await anext(events) == ": keep-alive"
            await connection.close()

    asyncio.run(main())


def test_who_reads_nothing_has_no_excuse() -> None:
    """A client that does not even take the first events is bounded as any other."""

    async def main() -> None:
        go = asyncio.Event()

        async def later(message: Message, say: Say) -> None:
            if message.HasField("submit"):
                await go.wait()
                await flood(message, say)

        async def never(message: Any) -> None:
            await asyncio.Event().wait()

        async with cluster(later, max_buffered_tokens=100) as (_, router):
            prepared = await router.preparation.prepare(ask(), "t", None)
            client = router.hub.submit(prepared.request, bounded=True)
            client.excused = True
            one = EventStream({}, never, [Call(prepared, client, "t", Claim("t", "", 0, lambda error: None))])
            opening = asyncio.create_task(one.write(b"data: x\n\n"))
            await asyncio.sleep(0)
            one.look(0.0, 15.0)
            go.set()
            await eventually(lambda: client.request.done)
            assert client.request.error is not None and client.request.error.reason is Reason.SLOW_CONSUMER
            opening.cancel()

    asyncio.run(main())
