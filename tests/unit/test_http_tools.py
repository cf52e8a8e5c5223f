"""Tools and reasoning at the HTTP door: what is asked for, and what is told of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from octavo.v1 import common_pb2, inference_pb2, scheduler_pb2

from router.http.journal import Journal
from router.parking import Mark
from router.speech.choice import manner_of
from router.validate import MAX_TOOLS
from tests.unit.http_door import Door, data_of, door
from tests.unit.test_router_fakes import FakeScheduler, Say, asset_files, byte_level_tokenizer, tokens
from tests.unit.tool_templates import LLAMA_3, MISTRAL, QWEN_2, QWEN_3, REASONER

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
LIST = {"type": "function", "function": {"name": "list", "parameters": {"type": "array"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Röm"}}\n</tool_call>'
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "tools": [WEATHER, NOW]}
_ENCODER = byte_level_tokenizer()


def saying(text: str, pieces: int = 3, end: common_pb2.FinishReason = common_pb2.FINISH_REASON_STOP) -> Any:
    """A script that says so, a few tokens at a time, to every request, from where a resumed one stands."""
    ids = _ENCODER.encode(text, add_special_tokens=False).ids
    ids += [1] if end == common_pb2.FINISH_REASON_STOP else []

    async def script(message: scheduler_pb2.AttachRequest, say: Say) -> None:
        if not message.HasField("submit"):
            return
        handle = message.submit.handle
        for at in range(0, len(ids), pieces):
            last = end if at + pieces >= len(ids) else 0
            await say(tokens(0, (handle, at, ids[at : at + pieces], last)))

    return script


@asynccontextmanager
async def told(text: str, template: str = QWEN_3, **options: Any) -> AsyncIterator[tuple[FakeScheduler, Door]]:
    """A door to a model with this template, which says `text`."""
    files = asset_files(chat_template__jinja=template.encode())
    async with door(saying(text), files=files, **options) as (scheduler, at):
        yield scheduler, at


async def whole(at: Door, body: Mapping[str, Any]) -> dict[str, Any]:
    reply = await at.ask("POST", CHAT, {**body})
    assert reply.status == 200, reply.body
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


async def streamed(at: Door, body: Mapping[str, Any]) -> dict[str, Any]:
    """The choice that the deltas join to."""
    connection = await at.connect()
    await connection.send("POST", CHAT, {**body, "stream": True})
    status, _ = await connection.head()
    assert status == 200
    message: dict[str, Any] = {"content": None}
    choice: dict[str, Any] = {"message": message}
    async for event in connection.events():
        if event == "data: [DONE]":
            break
        part = data_of(event)["choices"][0]
        join(message, part["delta"])
        choice["finish_reason"] = part["finish_reason"]
    await connection.close()
    return choice


def join(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name in ("content", "reasoning", "reasoning_content"):
        if delta.get(name):
            message[name] = (message.get(name) or "") + delta[name]
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            assert call["index"] == len(calls) and call["type"] == "function"
            calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = choice["message"].get("tool_calls") or []
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


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


def test_the_effort_of_reasoning_is_for_the_template_that_asks_for_it() -> None:
    asks = "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}{{- reasoning_effort }}"

    async def shown(at: Door, scheduler: FakeScheduler, **more: Any) -> str:
        assert (await whole(at, {"messages": BODY["messages"]} | more))["finish_reason"] == "stop"
        return last_prompt(scheduler)

    def last_prompt(scheduler: FakeScheduler) -> str:
        return _ENCODER.decode(np.frombuffer(scheduler.submits()[-1].prompt[0].token_ids[:24], "<i4").tolist())

    async def main() -> None:
        async with told("hello", asks + QWEN_3) as (scheduler, at):
            assert (await shown(at, scheduler)).startswith("medium")
            assert (await shown(at, scheduler, reasoning_effort="low")).startswith("low")
            kwargs = {"chat_template_kwargs": {"reasoning_effort": "high"}, "reasoning_effort": "high"}
            assert (await shown(at, scheduler, **kwargs)).startswith("high")
            for effort, expected in (
                ({"effort": "low", "summary": None}, "low"),
                ({"effort": None}, "medium"),
                (None, "medium"),
            ):
                reply = await at.ask("POST", "/v1/responses", {"input": "hello", "reasoning": effort})
                assert reply.json()["reasoning"] == {"effort": effort and effort["effort"], "summary": None}
                assert last_prompt(scheduler).startswith(expected)
        async with told("hello", "{# reasoning_effort #}" + QWEN_3) as (scheduler, at):
            reply = await at.ask("POST", CHAT, {"messages": BODY["messages"], "reasoning_effort": "low"})
            assert reply.status == 400 and reply.error["code"] == "unsupported_parameter"
            assert reply.error["param"] == "reasoning_effort" and "template" in reply.error["message"]
            reply = await at.ask("POST", "/v1/responses", {"input": "hello", "reasoning": {"effort": "low"}})
            assert (reply.status, reply.error["param"]) == (400, "reasoning.effort") and "template" in reply.error[
                "message"
            ]
            assert not scheduler.submits()

    asyncio.run(main())


def test_several_outputs_have_calls_of_their_own() -> None:
    async def main() -> None:
        async with told(CALL) as (_, at):
            reply = (await at.ask("POST", CHAT, BODY | {"n": 2})).json()
            ids = [choice["message"]["tool_calls"][0]["id"] for choice in reply["choices"]]
            assert len(set(ids)) == 2

    asyncio.run(main())


def test_what_is_asked_of_the_model() -> None:
    """The grammar that goes to the workers."""

    async def grammar_of(**more: Any) -> common_pb2.Grammar:
        async with told(CALL, more.pop("template", QWEN_2)) as (scheduler, at):
            reply = await at.ask("POST", CHAT, BODY | more)
            assert reply.status == 200, reply.body
            (submit,) = scheduler.submits()
            grammar = common_pb2.Grammar()
            grammar.CopyFrom(submit.grammar)
            return grammar

    async def main() -> None:
        assert not (await grammar_of()).WhichOneof("kind")
        assert not (await grammar_of(tool_choice="none")).WhichOneof("kind")
        calls = (await grammar_of(tool_choice="required")).calls
        assert [function.name for function in calls.functions] == ["weather", "now"]
        assert json.loads(calls.functions[0].json_schema)["required"] == ["city"] and calls.most > 1 and not calls.free
        assert (calls.opening, calls.closing, calls.arguments) == ("<tool_call>\n", "\n</tool_call>", "arguments")
        assert (await grammar_of(tool_choice="required", parallel_tool_calls=False)).calls.most == 1
        named = {"type": "function", "function": {"name": "now"}}
        calls = (await grammar_of(tool_choice=named)).calls
        assert [function.name for function in calls.functions] == ["now"] and calls.most == 1
        grammar = await grammar_of(tool_choice="required", template=QWEN_3)
        assert (grammar.after.opening, grammar.after.closing) == ("<think>", "</think>")
        grammar = await grammar_of(tool_choice="required", template=REASONER)
        assert (grammar.after.opening, grammar.after.closing) == ("", "</think>")
        strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
        calls = (await grammar_of(tools=[strict, NOW])).calls
        assert calls.free and calls.functions[0].json_schema and not calls.functions[1].json_schema
        calls = (await grammar_of(parallel_tool_calls=False)).calls  # also where the model chooses
        assert calls.free and calls.most == 1 and not any(function.json_schema for function in calls.functions)
        grammar = await grammar_of(tools=None, response_format={"type": "json_object"}, template=REASONER)
        assert grammar.json_schema and grammar.after.closing == "</think>"

    asyncio.run(main())


FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "required": ["a"]}}}


def test_a_form_beside_tools() -> None:
    """With none to be called it alone holds; where calls are asked for it has nothing to say; else the output is either."""

    async def asked(text: str, **more: Any) -> tuple[common_pb2.Grammar, dict[str, Any]]:
        async with told(text, QWEN_2) as (scheduler, at):
            choice = await whole(at, BODY | {"response_format": FORM} | more)
            assert (await streamed(at, BODY | {"response_format": FORM} | more))["message"]["content"] == (
                choice["message"]["content"] or None
            )
            grammar = common_pb2.Grammar()
            grammar.CopyFrom(scheduler.submits()[0].grammar)
            return grammar, choice

    async def main() -> None:
        grammar, _ = await asked('{"a": 1}', tool_choice="none")
        assert json.loads(grammar.json_schema)["required"] == ["a"]
        for mode in ("required", {"type": "function", "function": {"name": "weather"}}):
            grammar, choice = await asked(CALL, tool_choice=mode)
            assert grammar.WhichOneof("kind") == "calls" and not grammar.calls.or_json_schema
            assert calls_of(choice) == [("weather", {"city": "Röm"})]
        text = json.dumps({"a": CALL})
        for said, content, calls in ((text, text, []), (CALL, None, [("weather", {"city": "Röm"})])):
            grammar, choice = await asked(said)
            assert json.loads(grammar.calls.or_json_schema)["required"] == ["a"] and not grammar.calls.free
            assert choice["message"]["content"] == content and calls_of(choice) == calls

    asyncio.run(main())


def test_a_form_that_could_not_be_told_from_calls_is_refused_by_name() -> None:
    async def main() -> None:
        async with told("{}", LLAMA_3) as (scheduler, at):
            reply = await at.ask("POST", CHAT, BODY | {"response_format": FORM})
            assert (
                reply.status == 400 and reply.error["param"] == "response_format" and "JSON" in reply.error["message"]
            )
            assert not scheduler.submits()

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


def test_tools_are_looked_at_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of them took it 150 ms."""
    looked: list[int] = []

    def look(*given: Any) -> Any:
        looked.append(threading.get_ident())
        return manner_of(*given)

    async def main() -> None:
        monkeypatch.setattr("router.prepare.manner_of", look)
        async with told(CALL) as (_, at):
            await whole(at, BODY)
            assert looked and threading.get_ident() not in looked

    asyncio.run(main())


def test_a_named_call_is_no_reason_to_end() -> None:
    async def main() -> None:
        async with told(CALL) as (_, at):
            choice = await whole(at, BODY | {"tool_choice": {"type": "function", "function": {"name": "weather"}}})
            assert choice["finish_reason"] == "stop" and calls_of(choice) == [("weather", {"city": "Röm"})]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [NOW] * (MAX_TOOLS + 1)}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [NOW, NOW]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice.name"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tool_choice": "required", "tools": [LIST]}, "tools"),
        ({"functions": []}, "functions"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(more: dict[str, Any], param: str) -> None:
    async def main() -> None:
        async with told("hello") as (scheduler, at):
            reply = await at.ask("POST", CHAT, BODY | more)
            assert reply.status == 400, reply.body
            assert reply.error["param"] == param
            assert not scheduler.submits()

    asyncio.run(main())


def test_a_template_whose_calls_are_not_known_has_no_tools() -> None:
    async def main() -> None:
        async with told("hello", MISTRAL) as (_, at):
            reply = await at.ask("POST", CHAT, BODY)
            assert reply.status == 400 and reply.error["param"] == "tools" and "template" in reply.error["message"]
            assert (await whole(at, BODY | {"tool_choice": "none"}))["message"]["content"] == "hello"

    asyncio.run(main())


def test_a_conversation_with_calls_and_reasoning_is_shown_to_the_model() -> None:
    async def main() -> None:
        async with told("hello") as (scheduler, at):
            first = (await whole(at, BODY))["message"]
            call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
            messages = [
                *BODY["messages"],
                first | {"content": None, "tool_calls": [call], "reasoning_content": "hm", "reasoning": "hm"},
                {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
            ]
            await whole(at, BODY | {"messages": messages})
            reply = await at.ask("POST", "/tokenize", BODY | {"messages": messages})
            ids = reply.json()["tokens"]
            shown = (await at.ask("POST", "/detokenize", {"tokens": ids})).json()["prompt"]
            assert "<think>\nhm\n</think>" in shown and '{"name": "now", "arguments": {}}' in shown and "noon" in shown
            assert "<tools>" in shown and len(scheduler.submits()) == 2

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
