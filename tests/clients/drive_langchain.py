"""langchain-openai: `python drive_langchain.py BASE_URL`, run in its own environment. An assertion that fails is its exit code."""

from __future__ import annotations

import asyncio
import sys
from typing import Literal

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

URL = sys.argv[1]
COMMON = {"model": "mock", "base_url": URL, "api_key": "unused", "max_retries": 0}
TURNS = [SystemMessage("be brief"), HumanMessage("hello"), AIMessage("yes?"), HumanMessage("go on")]


@tool
def weather(city: Literal["Rome", "Oslo"]) -> str:
    """The weather there."""
    return f"fine in {city}"


def chat() -> None:
    answer = ChatOpenAI(**COMMON, max_completion_tokens=8).invoke(TURNS)
    assert isinstance(answer.content, str) and answer.content
    assert answer.usage_metadata["output_tokens"] == 8 and answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata["input_token_details"]["cache_read"] >= 0


def stream() -> None:
    model = ChatOpenAI(**COMMON, temperature=0, max_completion_tokens=12, stream_usage=True)
    whole = model.invoke(TURNS).content
    chunks = list(model.stream(TURNS))
    assert "".join(chunk.content for chunk in chunks) == whole
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 12


def n() -> None:
    result = ChatOpenAI(**COMMON, n=2, max_completion_tokens=4).generate([TURNS])
    assert len(result.generations[0]) == 2


def logprobs() -> None:
    answer = ChatOpenAI(**COMMON, logprobs=True, top_logprobs=2, max_completion_tokens=3).invoke(TURNS)
    assert len(answer.response_metadata["logprobs"]["content"]) == 3


def stop() -> None:
    model = ChatOpenAI(**COMMON, temperature=0, max_completion_tokens=12)
    whole = model.invoke(TURNS).content
    word = whole.split()[2]
    assert model.invoke(TURNS, stop=[word]).content == whole[: whole.index(word)]


def seed() -> None:
    model = ChatOpenAI(**COMMON, temperature=1, seed=3, max_completion_tokens=8)
    assert model.invoke(TURNS).content == model.invoke(TURNS).content


def completion() -> None:
    assert OpenAI(**COMMON, max_tokens=5).invoke("hello")


def tools() -> None:
    model = ChatOpenAI(**COMMON, temperature=0, max_completion_tokens=2_000)
    for choice in ("required", "weather"):
        bound = model.bind_tools([weather], tool_choice=choice)
        answer = bound.invoke(TURNS)
        assert answer.tool_calls and not answer.invalid_tool_calls
        assert all(call["name"] == "weather" and call["args"]["city"] in ("Rome", "Oslo") for call in answer.tool_calls)
        gathered = None
        for chunk in bound.stream(TURNS):
            gathered = chunk if gathered is None else gathered + chunk
        assert [call["args"] for call in gathered.tool_calls] == [call["args"] for call in answer.tool_calls]
    results = [ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in answer.tool_calls]
    brief = ChatOpenAI(**COMMON, max_completion_tokens=6).bind_tools([weather])
    assert brief.invoke([*TURNS, answer, *results]).content


def timeout() -> None:
    try:
        ChatOpenAI(**COMMON, timeout=0.5, max_completion_tokens=4_000, extra_body={"ignore_eos": True}).invoke(TURNS)
    except openai.APITimeoutError:
        return
    raise AssertionError("nothing timed out")


def cancel_by_closing() -> None:
    chunks = ChatOpenAI(**COMMON, max_completion_tokens=4_000, extra_body={"ignore_eos": True}).stream(TURNS)
    for _ in range(3):
        next(chunks)
    chunks.close()


def retry_on_429() -> None:
    async def main() -> None:
        model = ChatOpenAI(**COMMON | {"max_retries": 20}, max_completion_tokens=30, extra_body={"ignore_eos": True})
        for answer in await asyncio.gather(*(model.ainvoke(TURNS) for _ in range(24))):
            assert answer.usage_metadata["output_tokens"] == 30

    asyncio.run(main())


for check in (chat, stream, n, logprobs, stop, seed, completion, tools, timeout, cancel_by_closing, retry_on_429):
    check()
    print(check.__name__, flush=True)
