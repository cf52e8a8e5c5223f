"""A request's body as a JSON object: bounded in size and in what it unfolds to, and the large ones parsed off the event loop."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn, TypeVar

from router.http.errors import HttpError, Problem, invalid
from router.prepare import TextPool
from service.errors import OctavoError, Reason

T = TypeVar("T")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES = 16 << 20  # as gRPC's
MAX_VALUES = 500_000  # a value takes fifty times its bytes once parsed, and Python's lock meanwhile
_INLINE_BYTES = 32 << 10
_INLINE_VALUES = 1_024  # those of a Struct take microseconds each
_DISCARDED_BYTES = 4 * MAX_BODY_BYTES


class Gone(Exception):
    """The client has hung up: nobody to answer."""


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this name, in lower case."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


class Bodies:
    """Reads the bodies of a process; all that are being read hold so much memory at most. Owned by the event loop."""

    def __init__(self, pool: TextPool, max_bytes: int = 256 << 20) -> None:
        self._pool = pool
        self._max_bytes = max_bytes
        self._held = 0

    async def read(self, scope: Scope, receive: Receive, translate: Callable[[dict[str, Any]], T]) -> T:
        """What `translate` makes of the object in the body; a large one is dealt with in a thread.

        Raises HttpError 400, 413 or 415, QUEUE_FULL, what `translate` raises, and Gone.
        """
        kind = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":  # so that no page of another site can send one: browsers ask first
            raise HttpError(Problem(415, "the request needs content-type: application/json", "content-type"))
        if (header(scope, b"content-encoding") or "identity") != "identity":
            raise HttpError(Problem(415, "a compressed body is not supported", "content-encoding"))
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self._held + size > self._max_bytes:
                raise OctavoError(Reason.QUEUE_FULL, "too many large requests are being read", retry_after_ms=500)
            self._held += size
            held += size

        try:
            body = await read_body(scope, receive, hold)
            if len(body) <= _INLINE_BYTES and _num_values(body) <= _INLINE_VALUES:
                return translate(parse(body))
            return await self._pool.run(len(body), lambda: translate(parse(body)))
        finally:
            self._held -= held


async def read_body(scope: Scope, receive: Receive, hold: Callable[[int], None] = lambda size: None) -> bytes:
    """All of it. `hold` is told of each piece. Raises HttpError 413 for too much, what `hold` raises, and Gone."""
    chunks: list[bytes] = []

    def keep(chunk: bytes) -> None:
        hold(len(chunk))
        chunks.append(chunk)

    await _each_chunk(scope, receive, keep, chunks.clear)
    return b"".join(chunks)


async def skip_body(scope: Scope, receive: Receive) -> None:
    """Read all of it and keep none. Raises HttpError 413 for too much, and Gone."""
    await _each_chunk(scope, receive, lambda chunk: None, lambda: None)


async def _each_chunk(
    scope: Scope, receive: Receive, take: Callable[[bytes], None], forget: Callable[[], None]
) -> None:
    """`forget`: called when it was too much, before the rest is awaited."""
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
        if header(scope, b"expect") is None:
            await _discard(receive, 0)
        raise _too_large()
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            forget()
            if message.get("more_body", False):
                await _discard(receive, size)
            raise _too_large()
        take(chunk)
        if not message.get("more_body", False):
            return


async def _discard(receive: Receive, size: int) -> None:
    """Let a client that sends on do so, within bounds: it reads no answer before, and closing on it would destroy the answer."""
    while size < _DISCARDED_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def parse(body: bytes) -> dict[str, Any]:
    """The object in these bytes. Raises HttpError 400 and 413."""
    if _num_values(body) > MAX_VALUES:
        raise HttpError(Problem(413, f"the body holds more than {MAX_VALUES} values", code="body_too_large"))
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise invalid(None, "the body is not valid UTF-8", "invalid_json") from None
    except RecursionError:
        raise invalid(None, "the body is nested too deeply", "invalid_json") from None
    except ValueError as error:
        raise invalid(None, f"the body is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(None, "the body must be a JSON object", "invalid_json")
    return value


def _num_values(body: bytes) -> int:
    """At least as many as it holds."""
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _too_large() -> HttpError:
    text = f"the body may have {MAX_BODY_BYTES} bytes at most"
    return HttpError(Problem(413, text, code="body_too_large", headers=(("connection", "close"),)))
