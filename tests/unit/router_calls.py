"""Calls of a router over gRPC, what they come to, and the scripts of schedulers that answer them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from octavo.v1 import common_pb2, inference_pb2, scheduler_pb2

from service.errors import OctavoError, from_rpc_error
from tests.unit.router_fakes import Say, byte_level_tokenizer, tokens
from tests.unit.waiting import eventually

TOKENIZER = byte_level_tokenizer()
TEXT = "hello world, 你好 😀!"
IDS = TOKENIZER.encode(TEXT, add_special_tokens=False).ids
EOS = TOKENIZER.token_to_id("</s>")
Message = scheduler_pb2.AttachRequest


async def say_text(message: Message, say: Say) -> None:
    """Every request is answered with TEXT, a token a batch, and EOS."""
    if message.HasField("submit"):
        handle, done = message.submit.handle, len(message.submit.output_token_ids) // 4
        for index, token_id in enumerate(IDS):
            if index >= done:
                await say(tokens(0, (handle, index, [token_id], 0)))
        await say(tokens(0, (handle, len(IDS), [EOS], common_pb2.FINISH_REASON_STOP)))


async def say_one_then_wait(message: Message, say: Say) -> None:
    """Every new request gets its first token, and a resumed one nothing."""
    if message.HasField("submit") and not message.submit.output_token_ids:
        await say(tokens(0, (message.submit.handle, 0, IDS[:1], 0)))


async def say_the_rest(message: Message, say: Say) -> None:
    """Every resumed request gets what it lacks of TEXT, and EOS; a new one nothing."""
    if message.HasField("submit"):
        done = len(message.submit.output_token_ids) // 4
        if done:
            await say(tokens(0, (message.submit.handle, done, [*IDS[done:], EOS], common_pb2.FINISH_REASON_STOP)))


async def collect(call: Any) -> list[inference_pb2.GenerateResponse]:
    return [message async for message in call]


def ask(text: str = "hello", **sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text=text, sampling=inference_pb2.SamplingParams(**sampling))


async def refuse(call: Any) -> OctavoError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            await collect(call)
        else:
            await call
    error = from_rpc_error(caught.value)
    assert error is not None, caught.value
    return error


def text_of(messages: list[inference_pb2.GenerateResponse]) -> str:
    return "".join(message.delta.text for message in messages)


async def stay_silent(message: Message, say: Say) -> None:
    """A queue that does not move."""


async def full_queue(message: Message, say: Say) -> None:
    """No room, and none for ten seconds."""
    if message.HasField("submit"):
        failed = scheduler_pb2.Failed(
            handle=message.submit.handle, reason=common_pb2.ERROR_REASON_QUEUE_FULL, retry_after_ms=10_000
        )
        await say(scheduler_pb2.AttachResponse(failed=failed))


class Slowly:
    """A scheduler's script: each token waits for `more`, so that a test decides when it comes."""

    def __init__(self) -> None:
        self.steps = asyncio.Queue[None]()
        self.said = 0

    def more(self, count: int) -> None:
        for _ in range(count):
            self.steps.put_nowait(None)

    async def until(self, events: Any) -> str:
        """The next event, with as many tokens as that takes."""
        following = asyncio.create_task(anext(events))
        while not following.done():
            self.more(1)
            said = self.said
            await eventually(lambda said=said: self.said > said)  # type: ignore[misc]
            await asyncio.wait([following], timeout=0.1)
        return await following

    async def __call__(self, message: Message, say: Say) -> None:
        if message.HasField("submit"):
            self.task = asyncio.create_task(self._say(message.submit, say))

    async def _say(self, submit: scheduler_pb2.Submit, say: Say) -> None:
        ids = [*IDS, EOS]
        for index in range(len(submit.output_token_ids) // 4, len(ids)):
            await self.steps.get()
            final = common_pb2.FINISH_REASON_STOP if index == len(IDS) else 0
            await say(tokens(0, (submit.handle, index, [ids[index]], final)))
            self.said += 1
