"""What tests of the HTTP door ask for, again and again."""

from __future__ import annotations

from typing import Any

from tests.unit.http_door import Connection, Door
from tests.unit.router_calls import IDS, Message
from tests.unit.router_fakes import Say, tokens

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


async def stream(at: Door, path: str = CHAT, **fields: Any) -> Connection:
    """A stream that was asked for, its head not read yet."""
    connection = await at.connect()
    body = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    headers = {name: str(fields.pop(name)) for name in list(fields) if name.startswith("x_")}
    await connection.send("POST", path, body | {"stream": True} | fields, **headers)
    return connection


async def one_token(message: Message, say: Say) -> None:
    if message.HasField("submit"):
        await say(tokens(0, (message.submit.handle, 0, IDS[:1], 0)))
