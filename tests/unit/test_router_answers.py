"""What the router's gRPC shell answers, against a scripted scheduler over real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from octavo.v1 import common_pb2, inference_pb2, scheduler_pb2

from service.columns import pack
from service.errors import Reason
from tests.unit.router_calls import (
    EOS,
    IDS,
    TEXT,
    TOKENIZER,
    Message,
    ask,
    collect,
    refuse,
    say_text,
    stay_silent,
    text_of,
)
from tests.unit.router_fakes import Say, cluster, tokens
from tests.unit.waiting import eventually


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


def test_started_comes_even_from_the_queue() -> None:
    async def main() -> None:
        async with cluster(stay_silent) as (_, router):
            call = router.stub.Generate(ask())
            assert (await call.read()).started.ticket
            call.cancel()

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
