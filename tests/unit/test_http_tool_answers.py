"""Calls and reasoning in a model's output: what the HTTP door tells of them, whole, streamed, cut and gone on with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest
from octavo.v1 import common_pb2, inference_pb2, scheduler_pb2

from router.http.journal import Journal
from router.parking import Mark
from tests.unit.http_door import Door, data_of, door
from tests.unit.http_requests import CHAT
from tests.unit.router_fakes import Say, asset_files, byte_level_tokenizer, tokens
from tests.unit.tool_calls import BODY, CALL, NOW, calls_of, join, saying, streamed, told, whole
from tests.unit.tool_templates import LLAMA_3, QWEN_2, QWEN_3, REASONER


@pytest.mark.parametrize(
    ("template", "text", "content", "reasoning", "calls"),
    [
        (QWEN_3, f"I look.\n{CALL}\n{CALL}", "I look.", None, [("weather", {"city": "Röm"})] * 2),
        (QWEN_3, f"<think>\nhm\n</think>\n\n{CALL}", None, "hm", [("weather", {"city": "Röm"})]),
        (REASONER, "hm\n</think>\n\nhello", "hello", "hm", []),
        (QWEN_3, "hello", "hello", None, []),
        (QWEN_2, CALL.replace("weather", "nope"), CALL.replace("weather", "nope"), None, []),
        (LLAMA_3, '{"name": "now", "parameters": {}}', None, None, [("now", {})]),
    ],
)
def test_what_a_text_is_told_as(
    template: str, text: str, content: str | None, reasoning: str | None, calls: Any
) -> None:
    async def main() -> None:
        async with told(text, template) as (_, at):
            for choice in (await whole(at, BODY), await streamed(at, BODY)):
                message = choice["message"]
                assert (message["content"], message.get("reasoning")) == (content, reasoning)
                assert message.get("reasoning_content") == reasoning
                assert calls_of(choice) == calls
                assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
            for choice in (await whole(at, BODY | {"include_reasoning": False}),):
                assert not choice["message"].get("reasoning") and choice["message"]["content"] == content

    asyncio.run(main())


def test_without_tools_calls_are_text_and_reasoning_is_not() -> None:
    async def main() -> None:
        body = {"messages": BODY["messages"]}
        async with told(f"<think>hm</think>{CALL}") as (_, at):
            for choice in (
                await whole(at, body),
                await streamed(at, body),
                await streamed(at, BODY | {"tool_choice": "none"}),
            ):
                assert (choice["message"]["content"], choice["message"]["reasoning"]) == (CALL, "hm")
                assert choice["finish_reason"] == "stop"
            body |= {"chat_template_kwargs": {"enable_thinking": False}}
            assert (await whole(at, body))["message"]["content"] == f"<think>hm</think>{CALL}"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("final", "content", "reasoning"),
    [
        ("<think>\nlet me", "hello", "see"),
        ("<think>a</think>b <think>c", "hello", "see"),
        ("<think>\nhm</think>\n\nso", "see</think>\n\nhello", None),
        ("so", "see</think>\n\nhello", None),
    ],
)
def test_a_thought_that_the_last_message_began_goes_on(final: str, content: str, reasoning: str | None) -> None:
    body = {
        "messages": [
            {"role": "user", "content": "is <think> a mark?"},
            {"role": "assistant", "content": final},
        ],
        "add_generation_prompt": False,
        "continue_final_message": True,
    }

    async def main() -> None:
        async with told(" see</think>\n\nhello" if reasoning else "see</think>\n\nhello") as (scheduler, at):
            for choice in (await whole(at, body), await streamed(at, body)):
                assert (choice["message"]["content"], choice["message"].get("reasoning")) == (content, reasoning)
            await whole(at, body | {"response_format": {"type": "json_object"}})
            assert scheduler.submits()[-1].grammar.after.closing == ("</think>" if reasoning else "")

    asyncio.run(main())


def test_several_outputs_have_calls_of_their_own() -> None:
    async def main() -> None:
        async with told(CALL) as (_, at):
            reply = (await at.ask("POST", CHAT, BODY | {"n": 2})).json()
            ids = [choice["message"]["tool_calls"][0]["id"] for choice in reply["choices"]]
            assert len(set(ids)) == 2

    asyncio.run(main())


@pytest.mark.parametrize(
    ("cut", "template", "call"),
    [
        (4, QWEN_2, None),
        (12, QWEN_2, None),
        (35, QWEN_2, None),
        (45, QWEN_2, ("weather", "")),
        (55, QWEN_2, ("weather", '{"city": "')),
        (5, QWEN_3, None),
        (8, LLAMA_3, None),
    ],
)
def test_a_call_that_is_cut_is_told_as_far_as_it_came(cut: int, template: str, call: tuple[str, str] | None) -> None:
    """And its mark is no content."""
    text = CALL.removeprefix("<tool_call>\n").replace("arguments", "parameters") if template is LLAMA_3 else CALL

    async def main() -> None:
        files = asset_files(chat_template__jinja=template.encode())
        async with door(saying(text[:cut], 1, common_pb2.FINISH_REASON_LENGTH), files=files) as (_, at):
            body = BODY | {"tool_choice": "required"}
            for choice in (await whole(at, body), await streamed(at, body)):
                assert choice["finish_reason"] == "length" and not choice["message"]["content"]
                calls = [one["function"] for one in choice["message"].get("tool_calls") or []]
                assert [(one["name"], one["arguments"]) for one in calls] == ([] if call is None else [call])

    asyncio.run(main())


def test_a_named_call_is_no_reason_to_end() -> None:
    async def main() -> None:
        async with told(CALL) as (_, at):
            choice = await whole(at, BODY | {"tool_choice": {"type": "function", "function": {"name": "weather"}}})
            assert choice["finish_reason"] == "stop" and calls_of(choice) == [("weather", {"city": "Röm"})]

    asyncio.run(main())


def test_a_stream_that_is_cut_anywhere_goes_on_with_its_calls() -> None:
    """Each event tells all of what a delta gives, and the state behind it is made again."""
    text = f"<think> what  now </think>I look.\n{CALL} {CALL}\n and  so"

    async def main() -> None:
        async with told(text) as (_, at):
            body = BODY | {"stream": True, "resume_grace_ms": 20_000}
            undisturbed = await streamed(at, BODY)
            assert len(calls_of(undisturbed)) == 2
            cut = 1
            while True:
                connection = await at.connect()
                await connection.send("POST", CHAT, body)
                await connection.head()
                message: dict[str, Any] = {"content": None}
                seen, over = "", False
                async for event in connection.events():
                    if event == "data: [DONE]" or event.endswith("data: [DONE]"):
                        over = True
                        break
                    seen = event.partition("\n")[0].removeprefix("id: ")
                    join(message, data_of(event)["choices"][0]["delta"])
                    if int(seen.rpartition(":")[2]) == cut:
                        break
                await connection.close()
                if over:
                    break
                connection = await at.connect()
                await connection.send("GET", CHAT, last_event_id=seen)
                status, _ = await connection.head()
                assert status == 200
                async for event in connection.events():
                    if event.endswith("data: [DONE]"):
                        break
                    join(message, data_of(event)["choices"][0]["delta"])
                await connection.close()
                for call in message["tool_calls"]:
                    call.pop("id")
                for call in undisturbed["message"]["tool_calls"]:
                    call.pop("id", None)
                assert message == undisturbed["message"], cut
                cut += 1
            assert cut > 8

    asyncio.run(main())


def test_grpc_tells_the_text_as_it_was_written() -> None:
    async def main() -> None:
        async with told(CALL) as (_, at):
            request = inference_pb2.GenerateRequest()
            request.chat.messages.add(role="user").content.add(text="hello")
            request.chat.tools.add().update(NOW)
            answer = await at.router.stub.Complete(inference_pb2.CompleteRequest(request=request))
            assert answer.outputs[0].text == CALL

    asyncio.run(main())


def test_the_end_of_an_output_is_marked_with_all_of_its_text() -> None:
    """Also with that of deltas which told nothing yet."""
    nothing: Any = None
    journal = Journal("req-a", nothing, nothing)
    journal.delta(inference_pb2.Delta(index=0, token_ids=[1], text_bytes=1), b"x")
    journal.delta(inference_pb2.Delta(index=0, token_ids=[2], text_bytes=5), b"")
    journal.finished(inference_pb2.Finished(index=0), b"y")
    assert journal.back_to(2) == {0: Mark(2, 5, finished=True)}
    assert journal.back_to(1) == {0: Mark(1, 1)}
    journal.finished(inference_pb2.Finished(index=0), b"y")
    assert journal.back_to(3) == {0: Mark(1, 1, finished=True)}


async def responded(at: Door, body: Mapping[str, Any], cut: int = 0) -> tuple[str, str, str]:
    """Text of the deltas, of the event that ends them, and of the last response; gone on with after the event `cut`."""
    deltas, done, last, seen = "", "", "", ""
    headers: dict[str, str] = {}
    for go_on in (False, True):
        connection = await at.connect()
        await connection.send("POST", "/v1/responses", {**body, "stream": True}, **headers)
        assert (await connection.head())[0] == 200
        async for event in connection.events():
            if event.startswith("id: "):
                seen, _, event = event.removeprefix("id: ").partition("\n")
            told = json.loads(event.partition("data: ")[2])
            deltas += told["delta"] if told["type"] == "response.output_text.delta" else ""
            done = told["text"] if told["type"] == "response.output_text.done" else done
            if told["type"] == "response.completed":
                last = told["response"]["output"][0]["content"][0]["text"]
            if not go_on and cut and int(seen.rpartition(":")[2]) == cut:
                break
        await connection.close()
        if last and not go_on:
            break
        headers = {"last_event_id": seen}
    return deltas, done, last


@pytest.mark.parametrize(("text", "answer"), [("<think>hm</think> yes and no", "yes and no"), ("<thin", "<thin")])
def test_a_response_is_the_answer_without_the_reasoning(text: str, answer: str) -> None:
    async def main() -> None:
        async with told(text) as (_, at):
            body = {"input": "hello"}
            whole = (await at.ask("POST", "/v1/responses", body)).json()
            assert whole["output"][0]["content"][0]["text"] == answer
            assert await responded(at, body) == (answer,) * 3
            for cut in range(1, 12):
                assert await responded(at, body | {"resume_grace_ms": 20_000}, cut) == (answer,) * 3, cut

    asyncio.run(main())


def test_marks_are_part_of_the_output_where_the_tokenizer_calls_them_special() -> None:
    encoder = byte_level_tokenizer()
    encoder.add_special_tokens(["<tool_call>", "</tool_call>", "<other>"])
    ids = [*encoder.encode(f"<other>{CALL}", add_special_tokens=False).ids, 1]
    assert encoder.token_to_id("<tool_call>") in ids

    async def script(message: scheduler_pb2.AttachRequest, say: Say) -> None:
        if message.HasField("submit"):
            await say(tokens(0, (message.submit.handle, 0, ids, common_pb2.FINISH_REASON_STOP)))

    async def main() -> None:
        files = asset_files(encoder, chat_template__jinja=QWEN_2.encode())
        async with door(script, files=files) as (_, at):
            choice = await whole(at, BODY)
            assert calls_of(choice) == [("weather", {"city": "Röm"})] and choice["message"]["content"] is None

    asyncio.run(main())
