"""Answers with many log-probabilities: how many there may be, and what writing them holds beside them."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import MutableMapping
from typing import Any

import pytest
from octavo.v1 import common_pb2, inference_pb2
from starlette.responses import Response

from router.http.app import _WRITTEN, _send
from router.http.ask import Options
from router.http.chat import ChatView, read_chat
from router.http.completions import CompletionView, read_completions
from router.http.jsontext import Each, dumps, dumps_long
from tests.unit.http_door import door
from tests.unit.router_calls import say_text

PROMPTS, TOKENS, TOP = 32, 64, 20


def answer_to(prompt: int) -> inference_pb2.CompleteResponse:
    answer = inference_pb2.CompleteResponse(request_id="req-1", model="m", digest="d" * 64)
    output = answer.outputs.add(text=" a" * TOKENS, finish_reason=common_pb2.FINISH_REASON_LENGTH)
    output.usage.prompt_tokens, output.usage.completion_tokens = 2, TOKENS
    for _ in range(TOKENS):
        entry = output.logprobs.add()
        entry.token.text, entry.token.logprob, entry.token.rank = " a", -0.5, 1
        for rank in range(TOP):
            entry.top.add(text=f" {prompt}-{rank}", logprob=-0.25 * rank, rank=rank + 1)
    return answer


def test_choices_are_written_one_at_a_time() -> None:
    """As objects all of them are several times their text."""
    ask = read_completions({"prompt": ["x"] * PROMPTS, "logprobs": TOP, "max_tokens": TOKENS}, Options())
    view = CompletionView(ask)
    answers = [answer_to(prompt) for prompt in range(PROMPTS)]
    view.answer(answers[:1])  # what is made once is made
    tracemalloc.start()
    try:
        text = view.answer(answers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(text)
    told = json.loads(text)
    assert [choice["index"] for choice in told["choices"]] == list(range(PROMPTS))
    assert told["choices"][7]["logprobs"]["top_logprobs"][3][" 7-5"] == -1.25
    assert told["id"] == "cmpl-1" and told["object"] == "text_completion"
    assert told["usage"]["completion_tokens"] == PROMPTS * TOKENS and told["usage"]["prompt_tokens"] == 2 * PROMPTS


def test_the_log_probabilities_of_chats_are_written_a_few_at_a_time() -> None:
    """As objects those of one output would be ten times their text."""
    ask = read_chat({"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": TOP}, Options())
    answer = answer_to(0)
    answer.outputs[0].logprobs.extend(list(answer.outputs[0].logprobs) * 31)
    view = ChatView(ask)
    view.answer([answer_to(0)])
    tracemalloc.start()
    try:
        text = view.answer([answer])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(text)
    content = json.loads(text)["choices"][0]["logprobs"]["content"]
    assert len(content) == 32 * TOKENS and content[-1]["top_logprobs"][5]["token"] == " 0-5"


def test_what_is_written_in_pieces_is_what_is_written_at_once() -> None:
    plain: Any = {"a": [[1, "é"], {}, [], {"b": None}], "c": [{"i": i} for i in range(300)], "d": {}}
    assert dumps_long(plain) == dumps(plain).encode() == dumps_long(plain, levels=0)
    for count in (0, 1, 32, 33, 100):
        told = dumps_long({"a": Each(range(count), lambda i: {"i": i})})
        assert told == dumps({"a": [{"i": i} for i in range(count)]}).encode()


@pytest.mark.parametrize("size", [0, 1, _WRITTEN, _WRITTEN + 1, 3 * _WRITTEN])
def test_a_large_body_is_sent_in_pieces(size: int) -> None:
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    body = bytes(index % 251 for index in range(size))
    asyncio.run(_send(send, Response(body)))
    head, *bodies = sent
    assert (b"content-length", str(size).encode()) in head["headers"]
    assert b"".join(one["body"] for one in bodies) == body and all(len(one["body"]) <= _WRITTEN for one in bodies)
    assert [one.get("more_body", False) for one in bodies] == [True] * (len(bodies) - 1) + [False]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"n": 64, "logprobs": True, "top_logprobs": 20, "max_tokens": 400}, "top_logprobs"),
        ("chat/completions", {"n": 64, "max_completion_tokens": 40_000}, "max_completion_tokens"),
        ("completions", {"prompt": ["x"] * 128, "n": 8, "logprobs": 20, "max_tokens": 26}, "logprobs"),
        ("completions", {"prompt": ["x"] * 128, "max_tokens": 20_000}, "max_tokens"),
    ],
)
def test_what_would_be_too_large_in_one_piece_is_refused_before_anything_is_made(
    path: str, body: dict[str, Any], param: str
) -> None:
    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            asked = body if "prompt" in body else body | {"messages": [{"role": "user", "content": "x"}]}
            reply = await at.ask("POST", f"/v1/{path}", asked)
            assert reply.status == 400 and reply.error["param"] == param, reply.body
            assert "16777216" in reply.error["message"] and "stream" in reply.error["message"]
            assert not scheduler.submits()
            less = {"max_tokens": 24} if "prompt" in asked else {"max_tokens": 20, "max_completion_tokens": 20}
            assert (await at.ask("POST", f"/v1/{path}", asked | less)).status == 200

    asyncio.run(main())


def test_a_stream_has_no_such_bound() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            body = {"prompt": ["x"] * 2, "n": 64, "logprobs": 20, "max_tokens": 400}
            assert (await at.ask("POST", "/v1/completions", body)).status == 400
            assert (await at.ask("POST", "/v1/completions", body | {"stream": True})).status == 200

    asyncio.run(main())
