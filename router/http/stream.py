"""Server-sent events: how the outputs of one or several calls leave on one connection, and what becomes of a client that is silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

from octavo.v1 import inference_pb2

from router.http.ask import Ask
from router.http.body import Scope, Send
from router.http.errors import problem_of
from router.http.tasks import together
from router.inference import Call, Inference
from service.errors import OctavoError

KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class View(Protocol):
    """How one kind of request is answered. An event is the bytes of one whole server-sent event."""

    def answer(self, answers: list[inference_pb2.CompleteResponse]) -> bytes: ...
    def open(self, started: list[inference_pb2.Started]) -> list[bytes]: ...
    def delta(self, prompt: int, delta: inference_pb2.Delta) -> bytes: ...
    def finished(self, prompt: int, finished: inference_pb2.Finished) -> bytes: ...
    def close(self) -> list[bytes]: ...


class EventStream:
    """The events of one answer on their connection. Several writers may take turns: each write leaves as a whole."""

    def __init__(self, scope: Scope, send: Send, calls: Sequence[Call]) -> None:
        self._send = send
        self._abort: Callable[[], None] = scope.get("extensions", {}).get("octavo.abort", lambda: None)
        self._calls = calls
        self._wrote_at = time.monotonic()
        self._blocked = 0
        self.silent = False  # a comment is due

    async def start(self, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """The answer's head."""
        await self._send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]})

    async def write(self, events: bytes, *, last: bool = False) -> None:
        """Waits while the client reads slower than this, with what fits into the connection's buffer."""
        self._blocked += 1
        try:
            await self._send({"type": "http.response.body", "body": events, "more_body": not last})
        finally:
            self._blocked -= 1
        self.silent = False
        self._wrote_at = time.monotonic()

    def look(self, now: float, interval: float) -> None:
        """Called now and then: ask for a comment after a silence; hang up on a client whose request failed while it read nothing."""
        if self._blocked:
            if any(call.request.error is not None for call in self._calls):
                self._abort()
        elif now - self._wrote_at >= interval and not self.silent:
            self.silent = True
            self._calls[0].stream.wake()


class Streams:
    """All event streams of a process, looked at once a second."""

    def __init__(self, keep_alive: float) -> None:
        """`keep_alive`: seconds of silence after which a stream gets a comment."""
        self._keep_alive = keep_alive
        self._open: set[EventStream] = set()

    async def watch(self) -> None:
        """Until cancelled."""
        period = min(1.0, self._keep_alive / 2)
        while True:
            await asyncio.sleep(period)
            now = time.monotonic()
            for stream in list(self._open):
                stream.look(now, self._keep_alive)

    async def run(self, ask: Ask, view: View, inference: Inference, tenant: str, scope: Scope, send: Send) -> None:
        """Answer with a stream of events. An error before the first of them is raised; a later one is an event, and the last."""
        deadline = None if ask.timeout is None else inference.hub.now() + ask.timeout
        async with AsyncExitStack() as running:
            calls = [
                await running.enter_async_context(inference.running(request, tenant, deadline, bounded=True))
                for request in ask.requests
            ]
            started = [await inference.started(call) for call in calls]
            stream = EventStream(scope, send, calls)
            await stream.start(headers_of(started[0]))
            self._open.add(stream)
            try:
                await stream.write(b"".join(view.open(started)))
                if len(calls) == 1:
                    await _feed(stream, view, inference, 0, calls[0])
                else:
                    await together(_feed(stream, view, inference, at, call) for at, call in enumerate(calls))
                await stream.write(b"".join(view.close()), last=True)
            except OctavoError as error:
                event = b"data: " + problem_of(error, ask.names).body() + b"\n\n"
                await stream.write(event, last=True)
            finally:
                self._open.discard(stream)


async def _feed(stream: EventStream, view: View, inference: Inference, at: int, call: Call) -> None:
    """One call's events, to its end: all that is there at once in one write. Raises what it ends with."""
    request, outgoing = call.request, inference.hub.outgoing
    while True:
        events = b""
        for message in outgoing(call.stream):
            if message.HasField("delta"):
                events += view.delta(at, message.delta)
            elif message.HasField("finished"):
                events += view.finished(at, message.finished)
        if events:
            await stream.write(events)
        elif stream.silent:
            await stream.write(KEEP_ALIVE)
        if request.error is not None:
            raise request.error
        if request.delivered:
            return
        await call.stream.wait()


def headers_of(started: inference_pb2.Started | inference_pb2.CompleteResponse) -> list[tuple[bytes, bytes]]:
    """What is told of a request beside its answer."""
    return [(b"x-request-id", started.request_id.encode()), (b"x-octavo-seed", b"%d" % started.seed)]
