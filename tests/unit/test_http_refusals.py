"""What the HTTP door refuses is named as the client wrote it, and said so that it can be mended."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from octavo.v1 import inference_pb2

from service.errors import Reason
from tests.unit.http_door import door
from tests.unit.router_calls import refuse, say_text
from tests.unit.router_fakes import asset_files, byte_level_tokenizer, cluster, served
from tests.unit.waiting import eventually

HELLO = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def refusal(path: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The error that this request gets, a 400."""

    async def main() -> dict[str, Any]:
        async with door(say_text, **options) as (scheduler, at):
            reply = await at.ask("POST", path, body)
            assert reply.status == 400, reply.body
            assert scheduler.submits() == []
            return reply.error

    return asyncio.run(main())


SET_ELSEWHERE = (
    "add_generation_prompt", "continue_final_message", "tools", "documents", "messages", "chat_template", "tokenize", "strftime_now",
    "bos_token", "eos_token", "unk_token", "pad_token",
)  # fmt: skip


def test_what_the_server_sets_itself_is_no_template_argument() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            for name in SET_ELSEWHERE:
                more = {"chat_template_kwargs": {"fine": 1, name: True}}
                for path, body in (
                    (CHAT, {"messages": HELLO}),
                    ("/tokenize", {"messages": HELLO}),
                    (RESPONSES, {"input": "hello"}),
                ):
                    reply = await at.ask("POST", path, body | more)
                    assert reply.status == 400, (path, name)
                    assert reply.error["param"] == f"chat_template_kwargs.{name}"
                    top_level = name in ("add_generation_prompt", "continue_final_message", "tools")
                    assert (f"use the field {name}" in reply.error["message"]) == top_level
                request = inference_pb2.GenerateRequest(
                    chat={"messages": [{"role": "user", "content": [{"text": "x"}]}], "template_args": {name: True}}
                )
                error = await refuse(at.router.stub.Generate(request))
                assert [one.field for one in error.violations] == [f"chat.template_args.{name}"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "assistant"}, "messages[0].content"),
        ({"role": "system", "reasoning": "x"}, "messages[0].content"),
    ],
)
def test_a_message_without_content_is_none(message: Any, path: str) -> None:
    error = refusal(CHAT, {"messages": [message, *HELLO]})
    assert (error["param"], error["message"]) == (path, f"{path}: is missing")
    assert refusal("/tokenize", {"messages": [message]})["param"] == path
    assert refusal(RESPONSES, {"input": [message]})["param"] == path.replace("messages", "input")


def test_a_turn_of_the_model_may_be_calls_or_thoughts_alone() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "content": None, "reasoning": "hm"}]

    async def main() -> None:
        async with door(say_text) as (_, at):
            body = {"messages": [*turns, {"role": "user", "content": ""}]}
            assert (await at.ask("POST", CHAT, body)).status == 200

    asyncio.run(main())


def test_a_model_that_is_not_said_where_there_are_several() -> None:
    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            scheduler.models.append(served("other", bytes(32)))
            scheduler.break_streams()
            await eventually(lambda: len(at.router.session.models.all()) == 2)
            for path, body in (
                (CHAT, {"messages": HELLO}),
                (COMPLETIONS, {"prompt": "hello", "model": ""}),
                (RESPONSES, {"input": "hello"}),
                ("/tokenize", {"prompt": "hello"}),
                ("/tokenize", {"messages": HELLO}),
                ("/detokenize", {"tokens": [5]}),
            ):
                reply = await at.ask("POST", path, body)
                wanted = (400, "model", "model: must be one of other, tiny")
                assert (reply.status, reply.error["param"], reply.error["message"]) == wanted, path

    asyncio.run(main())


def test_a_prompt_without_tokens_is_named() -> None:
    tokenizer = byte_level_tokenizer()
    bare = json.loads(tokenizer.to_str()) | {"post_processor": None}  # adds no token of its own, as SmolLM2's
    files = asset_files(tokenizer, tokenizer__json=json.dumps(bare).encode())
    error = refusal(COMPLETIONS, {"prompt": ""}, files=files)
    assert (error["param"], error["message"]) == ("prompt", "prompt: the prompt has no tokens")
    assert refusal(COMPLETIONS, {"prompt": []})["param"] == "prompt"

    async def main() -> None:
        async with cluster(say_text, files) as (_, router):
            error = await refuse(router.stub.Generate(inference_pb2.GenerateRequest(text="")))
            assert error.reason is Reason.INVALID_ARGUMENT and [v.field for v in error.violations] == ["text"]

    asyncio.run(main())


def test_a_conversation_that_no_prompt_can_be_made_of_is_named() -> None:
    template = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0]['content'] }}"
    )
    files = asset_files(chat_template__jinja=template.encode())
    error = refusal(CHAT, {"messages": HELLO * 2}, files=files)
    assert error["param"] == "messages" and "one turn only" in error["message"]
    assert refusal("/tokenize", {"messages": HELLO * 2}, files=files)["param"] == "messages"
    error = refusal(RESPONSES, {"input": HELLO * 2}, files=files)
    assert error["param"] == "input" and "one turn only" in error["message"]
    unfinished = {"continue_final_message": True, "add_generation_prompt": False}
    error = refusal(CHAT, {"messages": [*HELLO, {"role": "assistant", "content": ""}], **unfinished})
    assert (
        error["param"] == "messages" and "continue_final_message needs a last message with content" in error["message"]
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (CHAT, "max_tokens"),
        (CHAT, "max_completion_tokens"),
        (COMPLETIONS, "max_tokens"),
        (RESPONSES, "max_output_tokens"),
    ],
)
def test_an_output_that_does_not_fit_is_named_and_no_prompt_that_does(path: str, name: str) -> None:
    asked: dict[str, Any] = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "hello"}, RESPONSES: {"input": "hello"}}
    hello: dict[str, Any] = asked[path]
    error = refusal(path, hello | {name: 9_000})
    assert (error["param"], error["code"]) == (name, "context_length_exceeded")
    assert "9000 output tokens exceed the model's context of 512 tokens" in error["message"]
    long = json.loads(json.dumps(hello).replace("hello", "hello " * 600))
    more: dict[str, Any]
    longer = json.loads(json.dumps(hello).replace("hello", "x" * 100_000))
    for prompt in (long, longer):
        for more in ({}, {name: 9_000}):
            error = refusal(path, prompt | more)
            assert (error["param"], error["code"]) == (next(iter(hello)), "context_length_exceeded")
    for wrong in (-1, 0):  # with the same words
        error = refusal(path, hello | {name: wrong})
        assert (error["param"], error["message"]) == (name, f"{name}: must be at least 1")
    error = refusal(path, hello | {name: 2**32})  # no more than a field can hold: to name that would help nobody
    assert (error["param"], error["message"]) == (name, f"{name}: is too large")


def test_tokens_are_needed_where_text_is_made_of_them() -> None:
    assert refusal("/detokenize", {})["param"] == "tokens"


def test_a_schema_that_is_missing_is_named() -> None:
    for given in (
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": None},
        {"type": "json_schema", "schema": {}},
    ):
        error = refusal(CHAT, {"messages": HELLO, "response_format": given})
        assert (error["param"], error["message"]) == (
            "response_format.json_schema",
            "response_format.json_schema: is missing",
        )
    nameless = {"type": "json_schema", "json_schema": {"name": "n"}}
    assert (
        refusal(CHAT, {"messages": HELLO, "response_format": nameless})["param"] == "response_format.json_schema.schema"
    )
    flat = {"type": "json_schema", "name": "n"}
    assert refusal(RESPONSES, {"input": "hello", "text": {"format": flat}})["param"] == "text.format.schema"


def test_a_model_that_is_not_there_is_told_with_those_that_are() -> None:
    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            for served_are in ("served is tiny", "served are other, tiny"):
                replies = [
                    await at.ask("POST", CHAT, {"messages": HELLO, "model": "smolm2"}),
                    await at.ask("POST", "/detokenize", {"tokens": [5], "model": "smolm2"}),
                    await at.ask("GET", "/v1/models/smolm2"),
                ]
                for reply in replies:
                    wanted = (404, "model", "model_not_found")
                    assert (reply.status, reply.error["param"], reply.error["code"]) == wanted
                    assert reply.error["message"] == f"no model named 'smolm2': {served_are}"
                scheduler.models = [served(), served("other", bytes(32))]
                scheduler.break_streams()
                await eventually(lambda: len(at.router.session.models.all()) == 2)

    asyncio.run(main())


def test_a_model_that_can_not_call_tools_is_named() -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    error = refusal(CHAT, {"messages": HELLO, "tools": [tool]})
    wanted = (
        "tools: the model tiny cannot call tools: its chat template shows no calls in a form that this server knows"
    )
    assert (error["param"], error["code"], error["message"]) == ("tools", "unsupported_parameter", wanted)
