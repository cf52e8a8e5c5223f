"""What a request with tools, a form or an effort of reasoning asks of the model, and what of it the HTTP door refuses."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import numpy as np
import pytest
from octavo.v1 import common_pb2

from router.speech.choice import manner_of
from router.validate import MAX_TOOLS
from tests.unit.http_door import Door
from tests.unit.http_requests import CHAT
from tests.unit.router_fakes import FakeScheduler
from tests.unit.tool_calls import BODY, CALL, ENCODER, NOW, WEATHER, calls_of, streamed, told, whole
from tests.unit.tool_templates import LLAMA_3, MISTRAL, QWEN_2, QWEN_3, REASONER

LIST = {"type": "function", "function": {"name": "list", "parameters": {"type": "array"}}}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "required": ["a"]}}}


def test_the_effort_of_reasoning_is_for_the_template_that_asks_for_it() -> None:
    asks = "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}{{- reasoning_effort }}"

    async def shown(at: Door, scheduler: FakeScheduler, **more: Any) -> str:
        assert (await whole(at, {"messages": BODY["messages"]} | more))["finish_reason"] == "stop"
        return last_prompt(scheduler)

    def last_prompt(scheduler: FakeScheduler) -> str:
        return ENCODER.decode(np.frombuffer(scheduler.submits()[-1].prompt[0].token_ids[:24], "<i4").tolist())

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
