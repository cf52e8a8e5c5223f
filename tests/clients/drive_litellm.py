"""litellm: `python drive_litellm.py BASE_URL`, run in its own environment. An assertion that fails is its exit code."""

from __future__ import annotations

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices

import litellm

URL = sys.argv[1]
COMMON = {"model": "openai/mock", "api_base": URL, "api_key": "unused", "num_retries": 0, "max_retries": 0}
HELLO = [{"role": "user", "content": "hello"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY | {"additionalProperties": False}}}
litellm.suppress_debug_info = True
litellm.telemetry = False


def chat() -> None:
    answer = litellm.completion(**COMMON, messages=HELLO, max_completion_tokens=8)
    assert answer.choices[0].message.content and answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"


def stream() -> None:
    same = {**COMMON, "messages": HELLO, "temperature": 0, "max_tokens": 12}
    whole = litellm.completion(**same).choices[0].message.content
    chunks = list(litellm.completion(**same, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage.completion_tokens == 12


def n() -> None:
    assert len(litellm.completion(**COMMON, messages=HELLO, n=2, max_tokens=4).choices) == 2


def logprobs() -> None:
    answer = litellm.completion(**COMMON, messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=3)
    assert len(answer.choices[0].logprobs.content) == 3


def stop() -> None:
    same = {**COMMON, "messages": HELLO, "temperature": 0, "max_tokens": 12}
    whole = litellm.completion(**same).choices[0].message.content
    word = whole.split()[2]
    assert litellm.completion(**same, stop=[word]).choices[0].message.content == whole[: whole.index(word)]


def seed() -> None:
    same = {**COMMON, "messages": HELLO, "temperature": 1, "max_tokens": 8, "seed": 3}
    assert len({litellm.completion(**same).choices[0].message.content for _ in range(2)}) == 1


def completion() -> None:
    answer = litellm.text_completion(**COMMON | {"model": "text-completion-openai/mock"}, prompt="hello", max_tokens=4)
    assert answer.choices[0].text


def errors() -> None:
    try:
        litellm.completion(**COMMON, messages=HELLO, extra_body={"foo": 1})
    except litellm.BadRequestError as error:
        assert "foo" in str(error)
    else:
        raise AssertionError("nothing was refused")


def tools() -> None:
    same = {**COMMON, "messages": HELLO, "tools": [WEATHER], "temperature": 0, "max_tokens": 2_000}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        message = litellm.completion(**same, tool_choice=choice).choices[0].message
        whole = [call.function.arguments for call in message.tool_calls]
        assert all(json.loads(arguments)["city"] in ("Rome", "Oslo") for arguments in whole)
        chunks = list(litellm.completion(**same, tool_choice=choice, stream=True))
        gathered = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
        assert [call.function.arguments for call in gathered] == whole
    results = [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in message.tool_calls]
    turns = [*HELLO, message.model_dump(), *results]
    after = litellm.completion(**COMMON, messages=turns, tools=[WEATHER], max_tokens=6)
    assert after.choices[0].message.content


def timeout() -> None:
    try:
        litellm.completion(**COMMON, messages=HELLO, max_tokens=4_000, timeout=0.5, extra_body={"ignore_eos": True})
    except litellm.Timeout:
        return
    raise AssertionError("nothing timed out")


def cancel_by_closing() -> None:
    async def main() -> None:
        chunks = await litellm.acompletion(
            **COMMON, messages=HELLO, max_tokens=4_000, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in chunks:
            break
        await chunks.aclose()

    asyncio.run(main())


def retry_on_429() -> None:
    async def main() -> None:
        patient = COMMON | {"num_retries": 20, "max_retries": 20}
        calls = [
            litellm.acompletion(**patient, messages=HELLO, max_tokens=30, extra_body={"ignore_eos": True})
            for _ in range(24)
        ]
        for answer in await asyncio.gather(*calls):
            assert answer.usage.completion_tokens == 30

    asyncio.run(main())


for check in (
    chat,
    stream,
    n,
    logprobs,
    stop,
    seed,
    completion,
    errors,
    tools,
    timeout,
    cancel_by_closing,
    retry_on_429,
):
    check()
    print(check.__name__, flush=True)
