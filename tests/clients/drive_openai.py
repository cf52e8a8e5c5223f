"""OpenAI's Python SDK: `python drive_openai.py BASE_URL`, run in its own environment. An assertion that fails is its exit code."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import openai

URL = sys.argv[1]
MODEL = "mock"
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}}
ASKED = {"model": MODEL, "messages": HELLO, "tools": [WEATHER, NOW], "max_tokens": 2_000, "temperature": 0}
client = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0)


def text_of(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def chat() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=8)
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0 and answer.model == MODEL


def stream() -> None:
    same = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**same).choices[0].message.content
    chunks = list(client.chat.completions.create(**same, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole
    assert chunks[-1].usage.completion_tokens == 20 and chunks[0].choices[0].delta.role == "assistant"
    word = whole.split()[3]
    with client.chat.completions.stream(
        **same, stop=word
    ) as events:  # the SDK's own accumulation, which takes "length" for an error
        assert events.get_final_completion().choices[0].message.content == whole[: whole.index(word)]


def n() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, n=3, seed=5, max_tokens=6, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 18


def logprobs() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == 4 and all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    old = client.completions.create(model=MODEL, prompt="hello", logprobs=1, echo=True, max_tokens=2).choices[0]
    assert old.text.startswith("hello") and old.logprobs.token_logprobs[0] is None and len(old.logprobs.tokens) == 7


def stop() -> None:
    same = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**same).choices[0].message.content
    word = whole.split()[3]
    cut = client.chat.completions.create(**same, stop=[word, "never"]).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == whole[: whole.index(word)]
    assert text_of(client.chat.completions.create(**same, stop=word, stream=True)) == cut.message.content


def seed() -> None:
    same = {"model": MODEL, "messages": HELLO, "temperature": 1, "max_tokens": 12}
    texts = [client.chat.completions.create(**same, seed=s).choices[0].message.content for s in (7, 7, 8)]
    assert texts[0] == texts[1]


def completions() -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["a", "b"], max_tokens=3, n=2, extra_body={"top_k": 5, "ignore_eos": True}
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    chunks = list(client.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks)


def responses() -> None:
    same = {"model": MODEL, "input": "hello", "temperature": 0, "max_output_tokens": 10}
    whole = client.responses.create(**same)
    assert whole.output_text and whole.status == "incomplete" and whole.usage.output_tokens == 10
    events = list(client.responses.create(**same, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    word = whole.output_text.split()[3]
    with client.responses.stream(**same, extra_body={"stop": word}) as accumulated:  # it waits for "completed"
        text = accumulated.get_final_response().output_text
    assert text == whole.output_text[: whole.output_text.index(word)]


def models() -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def errors() -> None:
    for fields, kind, param in (
        ({"top_p": 7}, openai.BadRequestError, "top_p"),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"extra_body": {"foo": 1}}, openai.BadRequestError, "foo"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
        ({"functions": [{"name": "f"}]}, openai.BadRequestError, "functions"),
    ):
        try:
            client.chat.completions.create(**{"model": MODEL, "messages": HELLO} | fields)
        except kind as error:
            assert error.param == param, error
        else:
            raise AssertionError(f"{fields} was not refused")


def fits(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    assert (name, given) == ("now", {}) or (name == "weather" and given["city"] in ("Rome", "Oslo")), (name, arguments)


def tools() -> None:
    """Required and named calls, whole and streamed; their results sent back."""
    one = client.chat.completions.create(**ASKED, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert one.finish_reason == "tool_calls" and one.message.content is None
    (call,) = one.message.tool_calls
    fits(call.function.name, call.function.arguments)
    named = {"type": "function", "function": {"name": "weather"}}
    choice = client.chat.completions.create(**ASKED, tool_choice=named).choices[0]
    assert choice.finish_reason == "stop" and [c.function.name for c in choice.message.tool_calls] == ["weather"]
    result = {"role": "tool", "tool_call_id": call.id, "content": "fine"}
    turns = [*HELLO, one.message, result]
    after = client.chat.completions.create(model=MODEL, messages=turns, tools=[WEATHER, NOW], max_tokens=6)
    assert after.choices[0].message.content


def parallel_tools() -> None:
    many = client.chat.completions.create(**ASKED, tool_choice="required").choices[0]
    whole = [(call.function.name, call.function.arguments) for call in many.message.tool_calls]
    assert len({call.id for call in many.message.tool_calls}) == len(whole)
    for name, arguments in whole:
        fits(name, arguments)
    calls: dict[int, list[str]] = {}
    reason = None
    for chunk in client.chat.completions.create(**ASKED, tool_choice="required", stream=True):
        reason = chunk.choices[0].finish_reason or reason
        for piece in chunk.choices[0].delta.tool_calls or ():
            if piece.id:
                calls[piece.index] = [piece.function.name, ""]
            calls[piece.index][1] += piece.function.arguments or ""
    assert [tuple(calls[index]) for index in range(len(calls))] == whole and reason == "tool_calls"
    with client.chat.completions.stream(**ASKED, tool_choice="required") as events:
        gathered = events.get_final_completion().choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in gathered] == whole


def timeout() -> None:
    hasty = client.with_options(timeout=0.5)
    began = time.monotonic()
    try:
        hasty.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4_000, extra_body={"ignore_eos": True})
    except openai.APITimeoutError:
        assert time.monotonic() - began < 20
    else:
        raise AssertionError("nothing timed out")


def cancel_by_closing() -> None:
    long = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=4_000, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(4):
        next(iter(long))
    long.close()


def retry_on_429() -> None:
    """More at once than the cluster takes: each is served in the end, since the SDK comes again when it is told to."""

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=URL, api_key="unused", max_retries=20) as many:
            calls = [
                many.chat.completions.create(
                    model=MODEL, messages=HELLO, max_tokens=30, extra_body={"ignore_eos": True}
                )
                for _ in range(24)
            ]
            for answer in await asyncio.gather(*calls):
                assert answer.usage.completion_tokens == 30

    asyncio.run(main())


for check in (
    chat, stream, n, logprobs, stop, seed, completions, responses, models, errors, tools, parallel_tools,
    timeout, cancel_by_closing, retry_on_429,
):  # fmt: skip
    check()
    print(check.__name__, flush=True)
