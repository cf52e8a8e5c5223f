"""Tools to call, models that call them, and the choice that the HTTP door makes of what they say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from octavo.v1 import common_pb2, scheduler_pb2

from tests.unit.http_door import Door, data_of, door
from tests.unit.http_requests import CHAT
from tests.unit.router_fakes import FakeScheduler, Say, asset_files, byte_level_tokenizer, tokens
from tests.unit.tool_templates import QWEN_3

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Röm"}}\n</tool_call>'
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "tools": [WEATHER, NOW]}
ENCODER = byte_level_tokenizer()


def saying(text: str, pieces: int = 3, end: common_pb2.FinishReason = common_pb2.FINISH_REASON_STOP) -> Any:
    """A script that says so, a few tokens at a time, to every request, from where a resumed one stands."""
    ids = ENCODER.encode(text, add_special_tokens=False).ids
    ids += [1] if end == common_pb2.FINISH_REASON_STOP else []

    async def script(message: scheduler_pb2.AttachRequest, say: Say) -> None:
        if not message.HasField("submit"):
            return
        handle = message.submit.handle
        for at in range(0, len(ids), pieces):
            last = end if at + pieces >= len(ids) else 0
            await say(tokens(0, (handle, at, ids[at : at + pieces], last)))

    return script


@asynccontextmanager
async def told(text: str, template: str = QWEN_3, **options: Any) -> AsyncIterator[tuple[FakeScheduler, Door]]:
    """A door to a model with this template, which says `text`."""
    files = asset_files(chat_template__jinja=template.encode())
    async with door(saying(text), files=files, **options) as (scheduler, at):
        yield scheduler, at


async def whole(at: Door, body: Mapping[str, Any]) -> dict[str, Any]:
    reply = await at.ask("POST", CHAT, {**body})
    assert reply.status == 200, reply.body
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


async def streamed(at: Door, body: Mapping[str, Any]) -> dict[str, Any]:
    """The choice that the deltas join to."""
    connection = await at.connect()
    await connection.send("POST", CHAT, {**body, "stream": True})
    status, _ = await connection.head()
    assert status == 200
    message: dict[str, Any] = {"content": None}
    choice: dict[str, Any] = {"message": message}
    async for event in connection.events():
        if event == "data: [DONE]":
            break
        part = data_of(event)["choices"][0]
        join(message, part["delta"])
        choice["finish_reason"] = part["finish_reason"]
    await connection.close()
    return choice


def join(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name in ("content", "reasoning", "reasoning_content"):
        if delta.get(name):
            message[name] = (message.get(name) or "") + delta[name]
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            assert call["index"] == len(calls) and call["type"] == "function"
            calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = choice["message"].get("tool_calls") or []
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
