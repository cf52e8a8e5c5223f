"""A router's HTTP door in this process, and a client of raw sockets that sees every byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from router.http.app import Gateway
from router.http.protocol import Limits
from router.http.server import HttpServer
from service.keys import ApiKeys, Authenticator
from service.settings import CommonSettings
from tests.unit.router_fakes import FakeScheduler, RouterUnderTest, Script, cluster


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


class Connection:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, method: str, path: str, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(data)}"]
        named = {
            "content-type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        lines += [f"{name}: {value}" for name, value in named.items()]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        status = int((await self.reader.readline()).split()[1])
        headers = {}
        while line := (await self.reader.readline()).strip():
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        return status, headers

    async def reply(self) -> Reply:
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            return Reply(status, headers, b"".join([chunk async for chunk in self.chunks()]))
        return Reply(status, headers, await self.reader.readexactly(int(headers["content-length"])))

    async def chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self.reader.readline(), 16):
            yield await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, each as its text without the blank line."""
        text = b""
        async for chunk in self.chunks():
            text += chunk
            while b"\n\n" in text:
                event, _, text = text.partition(b"\n\n")
                yield event.decode()
        assert not text

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):  # the server was quicker
            await self.writer.wait_closed()


class Door:
    """The HTTP server over a router under test."""

    def __init__(self, router: RouterUnderTest, server: HttpServer, gateway: Gateway) -> None:
        self.router, self.server, self.gateway = router, server, gateway

    async def connect(self) -> Connection:
        host, _, port = self.server.address.rpartition(":")
        return Connection(*await asyncio.open_connection(host, int(port)))

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        connection = await self.connect()
        try:
            async with asyncio.timeout(20):
                await connection.send(method, path, body, **headers)
                return await connection.reply()
        finally:
            await connection.close()


@asynccontextmanager
async def door(
    script: Script, keys: str | None = None, limits: Limits | None = None, keep_alive: float = 15.0, **options: Any
) -> AsyncIterator[tuple[FakeScheduler, Door]]:
    """One scheduler with a script, one router, and its HTTP door. `keys`: a key file's text."""
    async with cluster(script, **options) as (scheduler, router):
        authenticator = Authenticator(keys=None if keys is None else ApiKeys.parse(keys))
        gateway = Gateway(router.inference, router.pool, authenticator, CollectorRegistry(), keep_alive)
        server = HttpServer(gateway.app(), CommonSettings(), "127.0.0.1:0", limits)
        await server.start()
        tasks = [asyncio.create_task(server.keep_time()), asyncio.create_task(gateway.streams.watch())]
        try:
            yield scheduler, Door(router, server, gateway)
        finally:
            for task in tasks:
                task.cancel()
            await server.stop(0.1)


def data_of(event: str) -> Any:
    """The JSON of an event."""
    line = next(line for line in event.splitlines() if line.startswith("data: "))
    return json.loads(line.removeprefix("data: "))


def text_of(events: list[str]) -> str:
    """All text of a stream of chat or completion chunks of one choice."""
    parts = []
    for event in events:
        if "data: {" in event:
            for choice in data_of(event)["choices"]:
                parts.append(choice["delta"].get("content", "") if "delta" in choice else choice["text"])
    return "".join(parts)
