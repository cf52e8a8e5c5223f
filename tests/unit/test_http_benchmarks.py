"""What vLLM's `vllm bench serve` sends to a server, and what it reads in the answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.http_door import data_of, door, text_of
from tests.unit.router_calls import TEXT, say_text

STREAM: dict[str, Any] = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
OPTIONS: dict[str, Any] = {  # of its command line, each a field of the request
    "ignore_eos": True,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 20,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
COMPLETION: dict[str, Any] = {
    **STREAM,
    "prompt": "hello",
    "max_tokens": 40,
    "logprobs": None,
    "repetition_penalty": 1.0,
}
CONVERSATION: dict[str, Any] = {
    **STREAM,
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    "max_completion_tokens": 40,
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/completions", COMPLETION | OPTIONS),
        ("/v1/completions", COMPLETION | OPTIONS | {"prompt": [1, 5, 7]}),
        ("/v1/chat/completions", CONVERSATION),
        ("/v1/chat/completions", CONVERSATION | OPTIONS | {"repetition_penalty": 1.0}),
    ],
)
def test_its_requests_are_taken_and_its_reader_finds_text_and_usage(path: str, body: dict[str, Any]) -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            reply = await at.ask("POST", path, body, x_request_id="bench-1234-0")
            assert reply.status == 200, reply.body
            events = reply.body.decode().split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            *chunks, last = [data_of(event) for event in events[:-2]]
            assert text_of(events[:-3]) == TEXT
            # It takes what has choices for a token, and the counts from what has none.
            assert all(chunk["choices"] and not chunk["usage"] for chunk in chunks)
            assert last["choices"] == [] and last["usage"]["prompt_tokens"] > 0 < last["usage"]["completion_tokens"]

    asyncio.run(main())


def test_what_it_asks_before_it_begins_is_answered() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            model = (await at.ask("GET", "/v1/models")).json()["data"][0]
            assert model["id"] == model["root"]
            asked = {"model": model["id"], "prompt": "hello", "add_special_tokens": False}
            tokens = (await at.ask("POST", "/tokenize", asked)).json()["tokens"]
            text = (await at.ask("POST", "/detokenize", {"model": model["id"], "tokens": tokens})).json()["prompt"]
            assert text == "hello"
            assert (await at.ask("GET", "/health")).status == 200
            assert (await at.ask("GET", "/metrics")).status == 200

    asyncio.run(main())
