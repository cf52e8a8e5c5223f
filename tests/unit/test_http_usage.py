"""The tokens of reasoning in a usage: counted where each mark is one token, and not told where nobody knows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from octavo.v1 import common_pb2, scheduler_pb2
from tokenizers import AddedToken, Tokenizer

from tests.unit.http_door import data_of, door
from tests.unit.router_fakes import Say, asset_files, byte_level_tokenizer, tokens
from tests.unit.tool_templates import QWEN_2, QWEN_3, REASONER

HELLO = [{"role": "user", "content": "hello"}]
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
HM = "hello, so naïve 你"


def encoder(*marks: str) -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return tokenizer


MARKED, UNMARKED = encoder("</think>"), encoder()
NUM_HM = len(MARKED.encode(HM, add_special_tokens=False).ids)


def saying(tokenizer: Tokenizer, text: str, end: common_pb2.FinishReason, pieces: int) -> Any:
    ids = tokenizer.encode(text, add_special_tokens=False).ids + ([1] if end == STOP else [])

    async def script(message: scheduler_pb2.AttachRequest, say: Say) -> None:
        if message.HasField("submit"):
            submit = message.submit
            for at in range(len(submit.output_token_ids) // 4, len(ids), pieces):
                last = end if at + pieces >= len(ids) else 0
                await say(tokens(0, (submit.handle, at, ids[at : at + pieces], last)))

    return script


@pytest.mark.parametrize("pieces", [1, 3, 1_000])
@pytest.mark.parametrize(
    ("template", "text", "end", "count"),
    [
        (QWEN_3, f"<think>{HM}</think>yes", STOP, NUM_HM),
        (QWEN_3, f"<think>{HM}", LENGTH, NUM_HM),
        (QWEN_3, f"<think>{HM}", STOP, NUM_HM),  # the end token is none of it
        (QWEN_3, "<think></think>yes", STOP, 0),
        (QWEN_3, f"yes <think>{HM}</think>", STOP, 0),  # no thought, but an answer that speaks of one
        (REASONER, f"{HM}</think>yes </think>", STOP, NUM_HM),
        (REASONER, HM, LENGTH, NUM_HM),
        (QWEN_2, f"{HM}</think>", STOP, None),  # a model that marks none
    ],
)
def test_the_tokens_of_a_thought_are_counted(
    template: str, text: str, end: common_pb2.FinishReason, count: int | None, pieces: int
) -> None:
    found, responses = ask(MARKED, template, text, end, pieces)
    assert found == [None if count is None else 2 * count] * 2  # of two outputs
    assert responses == [count or 0] * 2


@pytest.mark.parametrize("template", [QWEN_3, REASONER])
def test_where_the_marks_are_no_tokens_nobody_knows(template: str) -> None:
    text = f"<think>{HM}</think>yes" if template == QWEN_3 else f"{HM}</think>yes"
    assert ask(UNMARKED, template, text, STOP, 3) == ([None] * 2, [None] * 2)


def test_after_a_resume_nobody_knows() -> None:
    async def main() -> None:
        files = asset_files(MARKED, chat_template__jinja=QWEN_3.encode())
        async with door(saying(MARKED, f"<think>{HM}</think>yes", STOP, 1), files=files) as (_, at):
            connection = await at.connect()
            body = {
                "messages": HELLO,
                "stream": True,
                "stream_options": {"include_usage": True},
                "resume_grace_ms": 9_000,
            }
            await connection.send("POST", CHAT, body)
            await connection.head()
            events = [event async for event in connection.events()]
            assert "completion_tokens_details" in data_of(events[-2])["usage"]
            seen = events[3].splitlines()[0].removeprefix("id: ")
            rest = (await at.ask("GET", CHAT, last_event_id=seen)).body.decode().split("\n\n")[:-1]
            assert "completion_tokens_details" not in data_of(rest[-2])["usage"]

    asyncio.run(main())


def ask(
    tokenizer: Tokenizer, template: str, text: str, end: common_pb2.FinishReason, pieces: int
) -> tuple[list[int | None], list[int | None]]:
    """Tokens of reasoning as a chat of two outputs tells them and as a response does, each whole and at the end of a stream."""

    async def main() -> tuple[list[int | None], list[int | None]]:
        files = asset_files(tokenizer, chat_template__jinja=template.encode())
        async with door(saying(tokenizer, text, end, pieces), files=files) as (_, at):
            chat: dict[str, Any] = {"messages": HELLO, "n": 2}
            whole = (await at.ask("POST", CHAT, chat)).json()["usage"]
            streamed = chat | {"stream": True, "stream_options": {"include_usage": True}}
            events = (await at.ask("POST", CHAT, streamed)).body.decode().split("\n\n")
            chats = [whole, data_of(events[-3])["usage"]]
            response = (await at.ask("POST", RESPONSES, {"input": "hello"})).json()["usage"]
            events = (await at.ask("POST", RESPONSES, {"input": "hello", "stream": True})).body.decode().split("\n\n")
            responses = [response, data_of(events[-2])["response"]["usage"]]
            return (
                [usage.get("completion_tokens_details", {}).get("reasoning_tokens") for usage in chats],
                [usage.get("output_tokens_details", {}).get("reasoning_tokens") for usage in responses],
            )

    return asyncio.run(main())
