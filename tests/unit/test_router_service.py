"""The router's gRPC shell against a scripted scheduler, over real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from octavo.v1 import common_pb2, inference_pb2, scheduler_pb2

from service.columns import pack
from service.errors import OctavoError, Reason, from_rpc_error
from tests.unit.test_router_fakes import Say, byte_level_tokenizer, cluster, eventually, tokens

TOKENIZER = byte_level_tokenizer()
TEXT = "hello world, 你好 😀!"
IDS = TOKENIZER.encode(TEXT, add_special_tokens=False).ids
EOS = TOKENIZER.token_to_id("</s>")
Message = scheduler_pb2.AttachRequest


async def say_text(message: Message, say: Say) -> None:
    """Every request is answered with TEXT, a token a batch, and EOS."""
    if message.HasField("submit"):
        handle, done = message.submit.handle, len(message.submit.output_token_ids) // 4
        for index, token_id in enumerate(IDS):
            if index >= done:
                await say(tokens(0, (handle, index, [token_id], 0)))
        await say(tokens(0, (handle, len(IDS), [EOS], common_pb2.FINISH_REASON_STOP)))


async def collect(call: Any) -> list[inference_pb2.GenerateResponse]:
    return [message async for message in call]


def ask(text: str = "hello", **sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text=text, sampling=inference_pb2.SamplingParams(**sampling))


def test_generate_streams_the_text() -> None:
    async def main() -> None:
        async with cluster(say_text) as (scheduler, router):
            messages = await collect(router.stub.Generate(ask(seed=3)))
            started, finished = messages[0].started, messages[-1].finished
            deltas = [m.delta for m in messages[1:-1]]
            assert started.model == "tiny" and started.seed == 3 and started.prompt_tokens == 2
            assert "".join(d.text for d in deltas) == TEXT
            assert [i for d in deltas for i in d.token_ids] == [*IDS, EOS]
            assert deltas[-1].text_bytes == len(TEXT.encode())
            assert finished.finish_reason == common_pb2.FINISH_REASON_STOP
            assert finished.stop_match.token_id == EOS
            assert finished.usage.completion_tokens == len(IDS) + 1
            submit = scheduler.submits()[0]
            assert submit.sampling.max_tokens == 512 - 2 and submit.seed == 3
            assert scheduler.cancels() == []

    asyncio.run(main())


async def refuse(call: Any) -> OctavoError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            await collect(call)
        else:
            await call
    error = from_rpc_error(caught.value)
    assert error is not None, caught.value
    return error


def text_of(messages: list[inference_pb2.GenerateResponse]) -> str:
    return "".join(message.delta.text for message in messages)


def test_a_grammar_is_checked_and_travels() -> None:
    grammar = common_pb2.Grammar(regex="h.*")

    async def main() -> None:
        async with cluster(say_text) as (scheduler, router):
            request = inference_pb2.CompleteRequest(request=ask(n=2))
            request.request.grammar.CopyFrom(grammar)
            await router.stub.Complete(request)
            assert [submit.grammar for submit in scheduler.submits()] == [grammar, grammar]
            request.request.grammar.regex = "h(("
            error = await refuse(router.stub.Complete(request))
            assert error.reason is Reason.GRAMMAR_INVALID and error.violations[0].field == "grammar.regex"
            assert len(scheduler.submits()) == 2

    asyncio.run(main())


@pytest.mark.parametrize("sampling", [{"ignore_eos": True}, {"min_tokens": 400}])
def test_under_a_grammar_an_end_token_ends_whatever_else_was_asked(sampling: Any) -> None:
    """The worker lets it through only where nothing else is allowed. An ignored one is no stop token for the scheduler, so the request
    is cancelled there, as after a stop string.
    """

    async def say_too_much(message: Message, say: Say) -> None:
        if message.HasField("submit"):
            handle = message.submit.handle
            await say(tokens(0, (handle, 0, [*IDS, EOS, EOS], 0)))

    async def main() -> None:
        async with cluster(say_too_much) as (scheduler, router):
            request = ask(**sampling)
            request.grammar.regex = ".*"
            messages = await collect(router.stub.Generate(request))
            assert text_of(messages) == TEXT
            finished = messages[-1].finished
            assert finished.finish_reason == common_pb2.FINISH_REASON_STOP
            assert finished.usage.completion_tokens == len(IDS) + 1
            await eventually(lambda: len(scheduler.cancels()) == 1)
            stops = scheduler.submits()[0].sampling.stop_token_ids
            assert (pack([EOS], "int32") in stops) != bool(request.sampling.ignore_eos)

    asyncio.run(main())


def test_complete_answers_once_with_all_outputs() -> None:
    async def main() -> None:
        async with cluster(say_text) as (scheduler, router):
            answer = await router.stub.Complete(inference_pb2.CompleteRequest(request=ask(n=3, seed=4)))
            assert [o.text for o in answer.outputs] == [TEXT] * 3
            assert [o.index for o in answer.outputs] == [0, 1, 2]
            assert answer.outputs[2].finish_reason == common_pb2.FINISH_REASON_STOP
            submits = scheduler.submits()
            assert len({s.seed for s in submits}) == 3 and len({s.group_id for s in submits}) == 1

    asyncio.run(main())


def test_a_stop_string_ends_the_stream_and_frees_the_row() -> None:
    async def endless(message: Message, say: Say) -> None:
        if message.HasField("submit"):
            for index, token_id in enumerate(IDS[:-1]):
                await say(tokens(0, (message.submit.handle, index, [token_id], 0)))

    async def main() -> None:
        async with cluster(endless) as (scheduler, router):
            messages = await collect(router.stub.Generate(ask(stop=["wor"])))
            assert text_of(messages) == "hello "
            assert messages[-1].finished.stop_match.text == "wor"
            await eventually(lambda: len(scheduler.cancels()) == 1)
            (cancel,) = scheduler.cancels()
            assert cancel.reason == scheduler_pb2.CANCEL_REASON_STOP_STRING
            assert cancel.num_output_tokens == messages[-1].finished.usage.completion_tokens

    asyncio.run(main())


async def stay_silent(message: Message, say: Say) -> None:
    """A queue that does not move."""


async def full_queue(message: Message, say: Say) -> None:
    """No room, and none for ten seconds."""
    if message.HasField("submit"):
        failed = scheduler_pb2.Failed(
            handle=message.submit.handle, reason=common_pb2.ERROR_REASON_QUEUE_FULL, retry_after_ms=10_000
        )
        await say(scheduler_pb2.AttachResponse(failed=failed))


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


def test_started_comes_even_from_the_queue() -> None:
    async def main() -> None:
        async with cluster(stay_silent) as (_, router):
            call = router.stub.Generate(ask())
            assert (await call.read()).started.ticket
            call.cancel()

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


def test_a_scheduler_that_breaks_mid_stream_is_not_noticed() -> None:
    """Every stream is cut after a few tokens, with duplicates and gaps; each client still reads exactly the text."""
    lives: dict[tuple[str, int], int] = {}

    async def main() -> None:
        async def mischief(message: Message, say: Say) -> None:
            if not message.HasField("submit"):
                return
            submit = message.submit
            key = (submit.request_id, submit.index)
            lives[key] = lives.get(key, -1) + 1
            done = len(submit.output_token_ids) // 4
            life = lives[key]
            if len(lives) < 8:  # until all are there
                return
            if life == 1:  # a gap
                await say(tokens(0, (submit.handle, done + 2, IDS[done + 2 : done + 3], 0)))
                return
            ids = [*IDS, EOS]
            for index in range(done, len(ids)):
                if life == 0 and index == done + 3:
                    scheduler.break_streams()
                    return
                final = common_pb2.FINISH_REASON_STOP if index == len(ids) - 1 else 0
                start = max(0, index - 2)  # the last two come twice
                await say(tokens(0, (submit.handle, start, ids[start : index + 1], final)))

        async with cluster(mischief) as (scheduler, router):
            calls = [collect(router.stub.Generate(ask(n=2))) for _ in range(4)]
            for messages in await asyncio.gather(*calls):
                for index in (0, 1):
                    deltas = [m.delta for m in messages if m.HasField("delta") and m.delta.index == index]
                    assert "".join(d.text for d in deltas) == TEXT
                    assert [i for d in deltas for i in d.token_ids] == [*IDS, EOS]
            assert router.session.dropped_tokens > 0

    asyncio.run(main())


@pytest.mark.parametrize("delivered", [0, 1, 3, 5, 100])
def test_a_stream_resumes_at_another_router(delivered: int) -> None:
    """Of the same cluster, by its ticket; with the seed and the tokens so far, and the text goes on where it was."""

    async def main() -> None:
        async with cluster(say_text) as (_, router):
            request = ask(seed=11)
            request.chat.messages.add(role="user").content.add(text="hello")
            whole = await collect(router.stub.Generate(request))
        deltas = [m.delta for m in whole if m.HasField("delta")][:delivered]
        state = inference_pb2.ResumeState(
            token_ids=[i for d in deltas for i in d.token_ids],
            text_bytes=deltas[-1].text_bytes if deltas else 0,
        )
        started = whole[0].started
        request.resume.CopyFrom(inference_pb2.Resume(ticket=started.ticket, outputs=[state], seed=started.seed))
        async with cluster(say_text) as (scheduler, router):
            again = await collect(router.stub.Generate(request))
            assert "".join(d.text for d in deltas) + text_of(again) == TEXT
            assert again[0].started.request_id == started.request_id and again[0].started.seed == 11
            assert again[-1].finished.usage.completion_tokens == len(IDS) + 1
            if delivered == 100:  # only the end was missing
                assert scheduler.submits() == [] and len(again) == 2
            wrong = inference_pb2.GenerateRequest()
            wrong.CopyFrom(request)
            wrong.chat.messages[0].content[0].text = "another prompt"
            assert (await refuse(router.stub.Generate(wrong))).reason is Reason.TICKET_INVALID
            request.resume.outputs[0].text_bytes += 1_000
            assert (await refuse(router.stub.Generate(request))).reason is Reason.INVALID_ARGUMENT

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


def test_tokenize_and_detokenize() -> None:
    async def main() -> None:
        async with cluster(say_text) as (_, router):
            answer = await router.stub.Tokenize(inference_pb2.TokenizeRequest(text=TEXT))
            assert list(answer.token_ids) == TOKENIZER.encode(TEXT).ids and answer.max_model_len == 512
            bare = await router.stub.Tokenize(inference_pb2.TokenizeRequest(text=TEXT, add_special_tokens=False))
            assert list(bare.token_ids) == IDS
            message = inference_pb2.ChatMessage(role="user", content=[inference_pb2.ContentPart(text="hi")])
            chat = inference_pb2.Chat(messages=[message])
            rendered = await router.stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
            assert rendered.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
            back = await router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[*IDS, EOS]))
            assert back.text == TEXT
            raw = inference_pb2.DetokenizeRequest(token_ids=[EOS], skip_special_tokens=False)
            assert (await router.stub.Detokenize(raw)).text == "</s>"
            error = await refuse(router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[1, 5_000])))
            assert error.violations[0].field == "token_ids[1]"
            error = await refuse(router.stub.Tokenize(inference_pb2.TokenizeRequest()))
            assert error.violations[0].field == "input"

    asyncio.run(main())


def test_models_and_their_assets() -> None:
    async def main() -> None:
        async with cluster(say_text) as (scheduler, router):
            await router.stub.Tokenize(inference_pb2.TokenizeRequest(text="x"))
            (model,) = (await router.stub.ListModels(inference_pb2.ListModelsRequest())).models
            assert (model.name, model.workers, model.ready, model.max_model_len) == ("tiny", 1, True, 512)
            files: dict[str, bytes] = {}
            async for message in router.stub.GetModelAssets(inference_pb2.GetModelAssetsRequest()):
                files[message.chunk.name] = message.chunk.data
            assert files == scheduler.files

    asyncio.run(main())


def test_logprobs_travel_with_their_tokens() -> None:
    async def with_logprobs(message: Message, say: Say) -> None:
        if not message.HasField("submit"):
            return
        prompt = message.submit.num_prompt_tokens
        batch = tokens(0, (message.submit.handle, 0, [IDS[0], EOS], common_pb2.FINISH_REASON_STOP))
        positions = [1, prompt, prompt + 1]
        batch.tokens.logprobs.CopyFrom(
            common_pb2.LogprobColumns(
                owner=pack([0, 0, 0], "int32"),
                position=pack(positions, "int32"),
                rank=pack([1, 2, 1], "int32"),
                num_entries=pack([2, 2, 2], "int32"),
                token_ids=pack([300, 301, IDS[0], 302, EOS, EOS], "int32"),
                logprobs=pack([-0.5, -1.0, -2.0, -0.25, -0.125, -float("inf")], "float32"),
            )
        )
        await say(batch)

    async def main() -> None:
        async with cluster(with_logprobs) as (_, router):
            request = inference_pb2.CompleteRequest(request=ask("hello", logprobs=1, prompt_logprobs=1))
            (output,) = (await router.stub.Complete(request)).outputs
            assert [(e.token.token_id, e.token.logprob, e.token.rank) for e in output.logprobs] == [
                (IDS[0], -2.0, 2),
                (EOS, -0.125, 1),
            ]
            assert output.logprobs[0].top[0].token_id == 302 and output.logprobs[0].top[0].rank == 1
            assert output.logprobs[1].top[0].logprob == -9999.0
            assert output.logprobs[0].token.bytes == output.logprobs[0].token.text.encode()
            first, second = output.prompt_logprobs
            assert not first.HasField("token") and second.token.token_id == 300

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
