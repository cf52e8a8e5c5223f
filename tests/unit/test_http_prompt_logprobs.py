"""Log-probabilities of prompts at the HTTP door, and how many there may be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from octavo.v1 import common_pb2

from tests.unit.http_door import door
from tests.unit.http_requests import CHAT
from tests.unit.router_calls import IDS, TEXT, Message, say_text
from tests.unit.router_fakes import Say, tokens


def test_prompts_come_back_with_their_log_probabilities() -> None:
    async def scored(message: Message, say: Say) -> None:
        if not message.HasField("submit"):
            return
        from service.columns import pack

        prompt = message.submit.num_prompt_tokens
        batch = tokens(0, (message.submit.handle, 0, [IDS[0]], common_pb2.FINISH_REASON_LENGTH))
        positions = list(range(1, prompt + 1))
        count = len(positions)
        batch.tokens.logprobs.CopyFrom(
            common_pb2.LogprobColumns(
                owner=pack([0] * count, "int32"),
                position=pack(positions, "int32"),
                rank=pack([2] * count, "int32"),
                num_entries=pack([2] * count, "int32"),
                token_ids=pack([IDS[0], 300] * count, "int32"),
                logprobs=pack([-0.5, -0.25] * count, "float32"),
            )
        )
        await say(batch)

    async def main() -> None:
        async with door(scored) as (_, at):
            body = {"prompt": "hello hello", "echo": True, "logprobs": 1, "max_tokens": 1}
            (choice,) = (await at.ask("POST", "/v1/completions", body)).json()["choices"]
            found = choice["logprobs"]
            assert choice["text"] == "hello hello" + TEXT[: len(choice["text"]) - 11]
            assert (
                found["tokens"][0] == "<s>" and found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
            )
            assert found["token_logprobs"][1:] == [-0.5] * (len(found["tokens"]) - 1)
            assert sorted(found["top_logprobs"][1].values()) == [-0.5, -0.25]
            answer = (await at.ask("POST", "/v1/completions", body | {"max_tokens": 0})).json()
            only = answer["choices"][0]
            assert only["text"] == "hello hello" and len(only["logprobs"]["tokens"]) == len(found["tokens"]) - 1
            assert answer["usage"]["completion_tokens"] == 0
            told = (
                await at.ask("POST", "/v1/completions", {"prompt": "hello", "prompt_logprobs": 1, "max_tokens": 1})
            ).json()
            first, second = told["choices"][0]["prompt_logprobs"]
            assert first is None and second["300"]["logprob"] == -0.25

    asyncio.run(main())


def test_an_output_that_ends_before_its_first_token_has_no_log_probabilities() -> None:
    """Nor has the prompt: they come with that token."""

    async def only_the_second(message: Message, say: Say) -> None:
        if message.HasField("submit") and message.submit.index == 0:
            await say(tokens(0, (message.submit.handle, 0, [], common_pb2.FINISH_REASON_ERROR)))
        else:
            await say_text(message, say)

    async def main() -> None:
        async with door(only_the_second) as (_, at):
            body = {"prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 40, "n": 2}
            reply = await at.ask("POST", "/v1/completions", body)
            assert reply.status == 200, reply.body
            failed, whole = reply.json()["choices"]
            assert failed["text"] == "hello" and failed["logprobs"]["tokens"] == []
            assert whole["text"] == "hello" + TEXT and whole["finish_reason"] == "stop"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("asked", "named"), [({"echo": True, "logprobs": 3}, "logprobs"), ({"prompt_logprobs": 3}, None)]
)
def test_too_many_log_probabilities_of_a_prompt_are_refused(
    asked: dict[str, Any], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.resolve.MAX_PROMPT_LOGPROBS", 7)

    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            reply = await at.ask("POST", "/v1/completions", {"prompt": "hello", **asked})
            assert reply.status == 400 and reply.error["param"] == (named or "prompt_logprobs")
            assert scheduler.submits() == []

    asyncio.run(main())


@pytest.mark.parametrize(("asked", "named"), [({"echo": True, "logprobs": 1}, "echo"), ({"prompt_logprobs": 1}, None)])
@pytest.mark.parametrize("more", [{"prompt": ["hello", [IDS[0], IDS[1]]]}, {"prompt": "hello", "n": 2}])
def test_so_are_too_many_of_all_prompts_together(
    asked: dict[str, Any], named: str | None, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts of two tokens, or one that two outputs show, with two each."""

    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            body = {"max_tokens": 40, **more, **asked}
            monkeypatch.setattr("router.http.settle.MAX_PROMPT_LOGPROBS", 8)
            reply = await at.ask("POST", "/v1/completions", body)
            assert reply.status == 200 and len(reply.json()["choices"]) == 2
            submitted = len(scheduler.submits())
            monkeypatch.setattr("router.http.settle.MAX_PROMPT_LOGPROBS", 7)
            reply = await at.ask("POST", "/v1/completions", body)
            assert reply.status == 400 and reply.error["param"] == (named or "prompt_logprobs")
            assert "more than 7" in reply.error["message"] and len(scheduler.submits()) == submitted

    asyncio.run(main())


def test_a_chat_shows_them_once_and_stays_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.http.settle.MAX_PROMPT_LOGPROBS", 1)

    async def main() -> None:
        async with door(say_text) as (_, at):
            body = {"messages": [{"role": "user", "content": "x"}], "n": 2, "prompt_logprobs": 1, "max_tokens": 40}
            reply = await at.ask("POST", CHAT, body)
            assert reply.status == 200 and len(reply.json()["choices"]) == 2

    asyncio.run(main())
