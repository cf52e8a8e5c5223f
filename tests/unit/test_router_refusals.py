"""What the router's gRPC shell refuses, cancels and cuts short, against a scripted scheduler over real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from octavo.v1 import common_pb2, inference_pb2, scheduler_pb2

from service.errors import OctavoError, Reason
from tests.unit.router_calls import (
    IDS,
    TEXT,
    Message,
    ask,
    collect,
    full_queue,
    refuse,
    say_text,
    stay_silent,
    text_of,
)
from tests.unit.router_fakes import Say, cluster, tokens
from tests.unit.waiting import eventually


def test_a_client_that_hangs_up_cancels() -> None:
    async def one_token(message: Message, say: Say) -> None:
        if message.HasField("submit"):
            await say(tokens(0, (message.submit.handle, 0, IDS[:1], 0)))

    async def main() -> None:
        async with cluster(one_token) as (scheduler, router):
            calls = [router.stub.Generate(ask(n=2)) for _ in range(20)]
            for call in calls:
                assert (await call.read()).HasField("started")
            for call in calls:
                call.cancel()
            await eventually(lambda: len(scheduler.cancels()) == 40)
            assert {c.reason for c in scheduler.cancels()} == {scheduler_pb2.CANCEL_REASON_CLIENT}
            await eventually(lambda: router.session.num_requests == 0 and not router.hub._streams)

    asyncio.run(main())


def test_a_deadline_travels_and_ends_the_stream() -> None:
    async def main() -> None:
        async with cluster(stay_silent) as (scheduler, router):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(router.stub.Generate(ask(), timeout=0.4))
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert 0 < scheduler.submits()[0].remaining_ms <= 400
            await eventually(lambda: len(scheduler.cancels()) == 1)

    asyncio.run(main())


def test_a_full_queue_is_told_with_a_delay() -> None:
    async def full(message: Message, say: Say) -> None:
        if message.HasField("submit"):
            failed = scheduler_pb2.Failed(
                handle=message.submit.handle,
                reason=common_pb2.ERROR_REASON_QUEUE_FULL,
                message="full",
                retry_after_ms=250,
            )
            await say(scheduler_pb2.AttachResponse(failed=failed))

    async def main() -> None:
        async with cluster(full) as (_, router):
            for call in (
                router.stub.Generate(ask()),
                router.stub.Complete(inference_pb2.CompleteRequest(request=ask())),
            ):
                error = await refuse(call)
                assert error.reason is Reason.QUEUE_FULL
                assert (
                    100 <= error.retry_after_ms <= 250
                )  # the second one may be refused unasked, with what is left of it

    asyncio.run(main())


def test_each_refusal_has_its_reason() -> None:
    async def main() -> None:
        async with cluster(say_text) as (_, router):
            cases = [
                (inference_pb2.GenerateRequest(text="x", model="other"), Reason.MODEL_UNKNOWN),
                (ask("hello " * 600), Reason.PROMPT_TOO_LONG),
                (ask("x" * 4_000_000), Reason.PROMPT_TOO_LONG),
                (inference_pb2.GenerateRequest(token_ids={"ids": [5] * 600}), Reason.PROMPT_TOO_LONG),
                (inference_pb2.GenerateRequest(token_ids={"ids": [9_999]}), Reason.INVALID_ARGUMENT),
                (ask(top_p=7.0), Reason.INVALID_ARGUMENT),
                (ask(stop=["x"] * 1_000_000), Reason.INVALID_ARGUMENT),
                (inference_pb2.GenerateRequest(text="x", adapter="a"), Reason.UNSUPPORTED),
                (inference_pb2.GenerateRequest(text="x", resume={"ticket": b"forged"}), Reason.TICKET_INVALID),
            ]
            for request, reason in cases:
                assert (await refuse(router.stub.Generate(request))).reason is reason
            assert router.session.num_requests == 0

    asyncio.run(main())


def test_a_prompt_that_is_too_long_is_named_however_that_is_seen() -> None:
    chat = {"messages": [{"role": "user", "content": [{"text": "hello " * 600}]}]}
    longer = {"messages": [{"role": "user", "content": [{"text": "x" * 100_000}]}]}

    async def main() -> None:
        async with cluster(say_text) as (_, router):
            cases = [
                (ask("hello " * 600), "text", "prompt tokens exceed the model's context of 512 tokens"),
                (
                    ask("x" * 100_000),
                    "text",
                    "100000 characters can't fit into the model's context of 512 tokens, which hold",
                ),
                (inference_pb2.GenerateRequest(chat=chat), "chat.messages", "prompt tokens exceed"),
                (inference_pb2.GenerateRequest(chat=longer), "chat.messages", "characters can't fit"),
                (inference_pb2.GenerateRequest(token_ids={"ids": [5] * 600}), "token_ids", "600 prompt tokens exceed"),
                (
                    inference_pb2.GenerateRequest(token_ids={"ids": [5] * 512}),
                    "token_ids",
                    "512 prompt tokens and an output",
                ),
            ]
            for request, field, words in cases:
                error = await refuse(router.stub.Generate(request))
                assert error.reason is Reason.PROMPT_TOO_LONG and words in error.message
                assert [violation.field for violation in error.violations] == [field]

    asyncio.run(main())


def test_what_fails_as_it_is_submitted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with cluster(stay_silent) as (_, router):
            submit = router.hub.submit

            def fail_at_once(request: Any, **options: Any) -> Any:
                stream = submit(request, **options)
                router.hub.fail(request, OctavoError(Reason.LOST, "gone"))
                return stream

            monkeypatch.setattr(router.hub, "submit", fail_at_once)
            for call in (
                router.stub.Generate(ask()),
                router.stub.Complete(inference_pb2.CompleteRequest(request=ask())),
            ):
                assert (await refuse(call)).reason is Reason.LOST

    asyncio.run(main())


def test_no_worker_is_told_soon_and_a_draining_router_refuses() -> None:
    async def main() -> None:
        async with cluster(say_text) as (scheduler, router):
            router.inference.draining = True
            assert (await refuse(router.stub.Generate(ask()))).reason is Reason.DRAINING
            router.inference.draining = False
            await scheduler.stop()
            await eventually(lambda: router.session.num_attached == 0)
            assert (await refuse(router.stub.Generate(ask()))).reason is Reason.NO_WORKER

    asyncio.run(main())


def test_a_full_scheduler_is_not_asked_again_at_once() -> None:
    async def main() -> None:
        async with cluster(full_queue) as (scheduler, router):
            for _ in range(5):
                error = await refuse(router.stub.Generate(ask()))
                assert error.reason is Reason.QUEUE_FULL
                assert error.retry_after_ms == 10_000
            assert len(scheduler.submits()) == 1
            urgent = ask()
            urgent.priority = 1  # may find room where others don't
            assert (await refuse(router.stub.Generate(urgent))).reason is Reason.QUEUE_FULL
            assert len(scheduler.submits()) == 2
            assert router.gate.num_inside == 0

    asyncio.run(main())


def test_a_resume_passes_every_bound() -> None:
    async def main() -> None:
        async with cluster(say_text, max_requests=1) as (scheduler, router):
            first = await collect(router.stub.Generate(ask(seed=3)))
            scheduler.script = full_queue
            assert (await refuse(router.stub.Generate(ask()))).reason is Reason.QUEUE_FULL
            asked = len(scheduler.submits())
            resume = ask(seed=3)
            resume.resume.ticket, resume.resume.seed = first[0].started.ticket, 3
            router.gate.enter("default", 0.0, resumed=True)  # the router holds all that it takes, too
            call = asyncio.create_task(collect(router.stub.Generate(resume)))
            await eventually(lambda: len(scheduler.submits()) > asked + 1)  # refused, and asked again
            scheduler.script = say_text
            assert text_of(await call) == TEXT

    asyncio.run(main())


def test_a_router_that_holds_enough_refuses_before_it_tokenizes() -> None:
    async def main() -> None:
        async with cluster(stay_silent, max_requests=2) as (scheduler, router):
            calls = [router.stub.Generate(ask()) for _ in range(2)]
            for call in calls:
                assert (await call.read()).HasField("started")
            error = await refuse(router.stub.Generate(ask("x" * 100_000)))  # too long, had anyone looked
            assert (error.reason, error.rule.code) == (Reason.QUEUE_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert error.retry_after_ms >= 100
            for call in calls:
                call.cancel()
            await eventually(lambda: router.gate.num_inside == 0)
            assert (await refuse(router.stub.Generate(ask("x" * 100_000)))).reason is Reason.PROMPT_TOO_LONG
            assert router.gate.num_inside == 0
            assert len(scheduler.submits()) == 2

    asyncio.run(main())


def test_an_idempotency_key_runs_once() -> None:
    async def main() -> None:
        async with cluster(stay_silent) as (_, router):
            request = ask()
            request.idempotency_key = "k"
            first = router.stub.Generate(request)
            assert (await first.read()).HasField("started")
            assert (await refuse(router.stub.Generate(request))).reason is Reason.DUPLICATE_REQUEST
            request.attempt = 1
            second = router.stub.Generate(request)
            assert (await second.read()).HasField("started")
            assert (await refuse(first.read())).reason is Reason.DUPLICATE_REQUEST
            second.cancel()
            await eventually(lambda: router.session.num_requests == 0)
            request.attempt = 0
            third = router.stub.Generate(request)
            assert (await third.read()).HasField("started")
            third.cancel()

    asyncio.run(main())


def test_a_client_that_does_not_read_is_cut() -> None:
    async def flood(message: Message, say: Say) -> None:
        if message.HasField("submit"):
            for start in range(0, 400, 10):
                await say(tokens(0, (message.submit.handle, start, [300] * 10, 0)))
                await asyncio.sleep(0.002)

    async def main() -> None:
        async with cluster(flood, max_buffered_tokens=100) as (scheduler, router):
            request = router.preparation.prepare(ask(), "t", None)
            stream = router.hub.submit((await request).request, bounded=True)  # and nobody reads it
            await eventually(lambda: stream.request.error is not None)
            assert stream.request.error is not None and stream.request.error.reason is Reason.SLOW_CONSUMER
            await eventually(lambda: len(scheduler.cancels()) == 1)
            assert scheduler.cancels()[0].reason == scheduler_pb2.CANCEL_REASON_SLOW_CONSUMER

    asyncio.run(main())


def test_an_answer_that_fits_into_no_message_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete collects: 64 outputs with 20 log-probabilities each would be hundreds of megabytes."""
    monkeypatch.setattr("router.hub._MAX_COLLECTED_BYTES", 400 * (8 + 32 * 3))

    async def flood(message: Message, say: Say) -> None:
        if message.HasField("submit"):
            for start in range(0, 500, 10):
                await say(tokens(0, (message.submit.handle, start, [300] * 10, 0)))

    async def main() -> None:
        async with cluster(flood) as (scheduler, router):
            request = inference_pb2.CompleteRequest(request=ask(logprobs=2, max_tokens=500))
            error = await refuse(router.stub.Complete(request))
            assert error.reason is Reason.UNSUPPORTED
            assert "use Generate" in error.message
            await eventually(lambda: len(scheduler.cancels()) == 1)

    asyncio.run(main())


def test_the_log_probabilities_of_the_prompt_count_in_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.hub._MAX_COLLECTED_BYTES", 2 * 32 * 21 + 50 * 8)

    async def some(message: Message, say: Say) -> None:
        if message.HasField("submit"):
            for start in range(0, 100, 10):
                end = common_pb2.FINISH_REASON_LENGTH if start == 90 else 0
                await say(tokens(0, (message.submit.handle, start, [300] * 10, end)))

    async def main() -> None:
        async with cluster(some) as (_, router):
            assert len((await router.stub.Complete(inference_pb2.CompleteRequest(request=ask()))).outputs) == 1
            request = inference_pb2.CompleteRequest(request=ask(prompt_logprobs=20))
            assert (await refuse(router.stub.Complete(request))).reason is Reason.UNSUPPORTED

    asyncio.run(main())


def test_started_is_not_told_before_a_scheduler_has_the_request() -> None:
    """It is a promise, and would keep a request waiting for the last worker's return that should soon be refused."""

    async def main() -> None:
        async with cluster(stay_silent) as (scheduler, router):
            await scheduler.stop()
            await eventually(lambda: router.session.num_attached == 0)
            async with asyncio.timeout(3):  # it lingers for 0.2 s here; the patience of those who were promised is 5
                call = router.stub.Generate(ask())
                first = await refuse(call)
            assert first.reason is Reason.NO_WORKER
            assert router.session.num_requests == 0

    asyncio.run(main())
