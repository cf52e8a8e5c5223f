"""Streams over HTTP that can be gone on with: begun, and resumed after an event."""

from __future__ import annotations

from typing import Any

from tests.unit.http_door import Connection, Door, Reply
from tests.unit.http_requests import CHAT

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "resume_grace_ms": 60_000}


async def begin(at: Door, body: dict[str, Any] | None = None, **headers: str) -> tuple[Connection, Any]:
    connection = await at.connect()
    await connection.send("POST", CHAT, BODY if body is None else body, **headers)
    status, _ = await connection.head()
    assert status == 200
    return connection, connection.events()


async def resume(at: Door, event_id: str, method: str = "POST", **headers: str) -> Reply:
    body = BODY if method == "POST" else None
    return await at.ask(method, CHAT, body, last_event_id=event_id, **headers)


def id_of(event: str) -> str:
    return event.splitlines()[0].removeprefix("id: ")


def events_of(reply: Reply) -> list[str]:
    assert reply.status == 200, reply.body
    return reply.body.decode().split("\n\n")[:-1]
