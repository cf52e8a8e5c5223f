"""Streams of completions from any server that speaks OpenAI's API, for the load generator: as few steps a token as gRPC takes.

A connection serves one stream after the other. Server-sent events are found by their blank lines, whatever else the transfer puts
between them; only those that must be understood are parsed: up to the first one with text, and the last ones.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, urlsplit

from octavo.cli.load_spec import LoadSpec

_LIMIT = 1 << 20


class HttpStreams:
    """All connections of one process. Belongs to one event loop."""

    def __init__(self, spec: LoadSpec) -> None:
        self._url = _split(spec.addresses[0])
        self._context = ssl.create_default_context(cadata=spec.tls_ca) if self._url.scheme == "https" else None
        self._head = _head(self._url, "POST", "/completions", spec.token)
        self._timeout = spec.timeout
        self._idle: list[_Connection] = []

    async def connect(self) -> None:
        """Whether the server can be reached. Raises OSError."""
        self._idle.append(await self._open())

    async def close(self) -> None:
        """Close all connections that no stream uses."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def stream(self, payload: bytes, on_tokens: Callable[[int], bool]) -> tuple[str, int | None]:
        """One stream. `on_tokens` gets 1 for each event with text, and ends the stream if it returns False.

        Returns what went wrong ("" for nothing) and the tokens that the server counted, if it did.
        """
        connection = self._idle.pop() if self._idle else None
        if connection is not None and connection.closed:
            connection = None
        try:
            async with asyncio.timeout(self._timeout):
                if connection is None:
                    connection = await self._open()
                problem, tokens, whole = await connection.stream(self._head, payload, on_tokens)
        except TimeoutError:
            problem, tokens, whole = f"DEADLINE: not over after {self._timeout:g} s", None, False
        except OSError as error:
            problem, tokens, whole = f"UNAVAILABLE: {error}", None, False
        if connection is not None:
            if whole and not connection.closed:
                self._idle.append(connection)
            else:
                connection.close()
        return problem, tokens

    async def _open(self) -> _Connection:
        host, port = self._url.hostname or "", self._url.port or (443 if self._context else 80)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, host, port, ssl=self._context)
        return connection


class _Connection(asyncio.Protocol):
    """One connection, with at most one stream at a time."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: Any = None
        self._buffer = b""
        self._wake: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._ring()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._ring()

    def close(self) -> None:
        """Hang up at once."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    async def stream(
        self, head: bytes, payload: bytes, on_tokens: Callable[[int], bool]
    ) -> tuple[str, int | None, bool]:
        """Problem, tokens by the server's count, and whether the connection can serve another stream."""
        self._transport.write(head % len(payload) + payload)
        while b"\r\n\r\n" not in self._buffer:
            if not await self._more():
                return "LOST: the connection broke", None, False
        answer, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        status = answer.split(b" ", 2)[1]
        if status != b"200":
            return await self._refusal(status.decode()), None, False
        begun, tokens = False, None
        while True:
            *events, self._buffer = self._buffer.split(b"\n\n")
            for event in events:
                at = event.find(b"data: ")
                if at < 0:
                    continue
                if event.startswith(b"[DONE]", at + 6):
                    while b"0\r\n\r\n" not in self._buffer:  # the end of a chunked answer
                        if not await self._more():
                            return "", tokens, False
                    self._buffer = b""
                    return "", tokens, True
                if begun and event.find(b'"choices":[{', at) >= 0 and event.find(b'"finish_reason":null', at) >= 0:
                    if not on_tokens(1):
                        return "", tokens, False
                    continue
                found = json.loads(event[at + 6 :])
                if "error" in found:
                    return _told(found["error"], "the stream"), tokens, False
                if any(choice.get("text") for choice in found.get("choices", ())):
                    begun = True
                    if not on_tokens(1):
                        return "", tokens, False
                if found.get("usage"):
                    tokens = int(found["usage"]["completion_tokens"])
            if not await self._more():
                return "LOST: the stream ended before its end", tokens, False

    async def _refusal(self, status: str) -> str:
        while not self.closed and len(self._buffer) < _LIMIT:
            try:
                body = self._buffer[self._buffer.index(b"{") : self._buffer.rindex(b"}") + 1]
                return _told(json.loads(body)["error"], status)
            except (ValueError, KeyError, TypeError):  # not all of it yet
                await self._more()
        return f"HTTP {status}: {self._buffer[:200].decode(errors='replace')}"

    async def _more(self) -> bool:
        """Wait for more bytes; False once none can come."""
        if self.closed:
            return False
        before = len(self._buffer)
        self._wake = asyncio.get_running_loop().create_future()
        await self._wake
        return len(self._buffer) > before

    def _ring(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


async def first_model(url: str, token: str | None, ca: str | None = None) -> str:
    """The first model that the server names. `ca`: PEM to trust instead of the system's.

    Raises OSError, and ValueError, LookupError or TypeError for an answer that names none.
    """
    parts = _split(url)
    context = ssl.create_default_context(cadata=ca) if parts.scheme == "https" else None
    port = parts.port or (443 if context else 80)
    reader, writer = await asyncio.open_connection(parts.hostname or "", port, ssl=context)
    try:
        head = _head(parts, "GET", "/models", token) % 0
        writer.write(head.replace(b"connection: keep-alive", b"connection: close"))
        answer = await reader.read(_LIMIT)
        while data := await reader.read(_LIMIT):
            answer += data
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise ValueError(f"GET {url}/models: {head.splitlines()[0].decode(errors='replace')}")
    start, end = body.find(b"{"), body.rfind(b"}")
    models = json.loads(body[start : end + 1])["data"]
    if not models:
        raise ValueError(f"{url} serves no model")
    return str(models[0]["id"])


def _told(error: Any, where: str) -> str:
    if not isinstance(error, dict):
        return f"HTTP {where}: {error}"
    return f"{error.get('code') or error.get('type') or where}: {error.get('message')}"


def _split(url: str) -> SplitResult:
    parts = urlsplit(url.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// address")
    return parts


def _head(url: SplitResult, method: str, path: str, token: str | None) -> bytes:
    """With a place for the body's length."""
    lines = [
        f"{method} {url.path}{path} HTTP/1.1",
        f"host: {url.netloc}",
        "content-type: application/json",
        "connection: keep-alive",
        *([] if token is None else [f"authorization: Bearer {token}"]),
    ]
    return "\r\n".join(lines).replace("%", "%%").encode() + b"\r\ncontent-length: %d\r\n\r\n"
