"""Server-sent events: how the outputs of one or several calls leave on one connection, and what becomes of a client that is silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from octavo.v1 import inference_pb2

from router.http.ask import Ask
from router.http.body import Scope, Send
from router.http.errors import HttpError, Problem, invalid, problem_of
from router.http.journal import Journal
from router.http.tasks import together
from router.http.view import View
from router.inference import Inference
from router.parking import Call, Expired, Mark
from router.speech.manner import PLAIN
from service.errors import OctavoError, Reason

_LAST_EVENT_ID = "last-event-id"
KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class EventStream:
    """The events of one answer on their connection. Several writers may take turns: each write leaves as a whole."""

    def __init__(self, scope: Scope, send: Send, calls: Sequence[Call]) -> None:
        self._send = send
        self._send_body: Send = scope.get("octavo.send", send)
        self._abort: Callable[[], None] = scope.get("extensions", {}).get("octavo.abort", lambda: None)
        self.calls = calls
        self._wrote_at = time.monotonic()
        self._blocked = 0
        self.silent = False  # a comment is due

    async def start(self, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """The answer's head."""
        await self._send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]})

    async def write(self, events: bytes, *, last: bool = False) -> None:
        """Waits while the client reads slower than this, with what fits into the connection's buffer."""
        self._blocked += 1
        self.silent = False
        try:
            await self._send_body({"type": "http.response.body", "body": events, "more_body": not last})
        finally:
            self._blocked -= 1
        self._wrote_at = time.monotonic()

    def look(self, now: float, interval: float) -> None:
        """Called now and then: ask for a comment after a silence; hang up on a client whose request failed while it read nothing."""
        if self._blocked:
            for call in self.calls:
                call.stream.excused = False
            if any(call.request.error is not None for call in self.calls):
                self._abort()
        elif now - self._wrote_at >= interval and not self.silent:
            self.silent = True
            for call in self.calls:  # who writes for one that was delivered is gone
                if not call.request.delivered:
                    call.stream.wake()


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

            async def enter(request: inference_pb2.GenerateRequest) -> Call:
                call = await running.enter_async_context(inference.running(request, tenant, deadline, bounded=True))
                call.stream.excused = len(ask.requests) > 1  # nobody reads before all have started
                return call

            calls = await together(enter(request) for request in ask.requests)
            ask.manner = calls[0].prepared.manner
            ask.forget_prompts()
            started = await together(inference.started(call) for call in calls)
            journal = None
            if calls[0].grace:
                journal = calls[0].view = Journal(calls[0].request_id, ask, view)
            stream = EventStream(scope, send, calls)
            await stream.start(headers_of(started[0]))
            opening = view.open(started)
            first = b"".join(opening) if journal is None else journal.opening(opening)
            await self._go_on(stream, first, ask, view, inference, journal)

    async def resume(self, event_id: str, inference: Inference, tenant: str, scope: Scope, send: Send) -> None:
        """Go on after this event with a stream that is parked here, or whose connection has not broken yet. Raises HttpError."""
        request_id, _, number = event_id.rpartition(":")
        found = inference.parking.find(request_id, tenant)
        if not (number.isascii() and number.isdigit() and len(number) <= 10):
            raise invalid(_LAST_EVENT_ID, "must be the id of an event")
        if found is not None and not isinstance(found.view, Journal):
            raise _no_stream(Problem(404, "no stream of this id is kept here"))
        if found is not None:
            _check_known(found.view, int(number))  # before anything is taken from anybody

        def stands(call: Call) -> dict[int, Mark]:
            kept: Journal = call.view
            _check_known(kept, int(number))  # another resume may have been quicker
            return kept.back_to(int(number))

        try:
            async with inference.resuming(request_id, tenant, stands) as call:
                journal: Journal = call.view
                if journal.ask.manner is not PLAIN:
                    journal.view.stand_at(await inference.told(call))
                stream = EventStream(scope, send, [call])
                started = call.started()
                await stream.start(headers_of(started))
                await self._go_on(stream, journal.opening([]), journal.ask, journal.view, inference, journal)
        except Expired as error:
            raise _no_stream(Problem(410, error.message)) from None
        except OctavoError as error:
            if error.reason is not Reason.INVALID_ARGUMENT:
                raise
            raise _no_stream(Problem(404, error.message)) from None

    async def _go_on(
        self, stream: EventStream, opening: bytes, ask: Ask, view: View, inference: Inference, journal: Journal | None
    ) -> None:
        """From after the head to the end; `opening` may be empty."""
        calls = stream.calls
        self._open.add(stream)
        try:
            if opening:
                await stream.write(opening)
            if len(calls) == 1:
                await _feed(stream, view, inference, 0, calls[0], journal)
            else:
                await together(_feed(stream, view, inference, at, call, None) for at, call in enumerate(calls))
            closing = view.close()
            await stream.write(b"".join(closing) if journal is None else journal.closing(closing), last=True)
        except OctavoError as error:
            await stream.write(view.fail(problem_of(error, ask.names)), last=True)
        finally:
            self._open.discard(stream)


async def _feed(
    stream: EventStream, view: View, inference: Inference, at: int, call: Call, journal: Journal | None
) -> None:
    """One call's events, to its end: all that is there at once in one write. Raises what it ends with."""
    request, outgoing = call.request, inference.hub.outgoing
    while True:
        events = b""
        for message in outgoing(call.stream):
            if message.HasField("delta"):
                event = view.delta(at, message.delta)
                events += event if journal is None else journal.delta(message.delta, event)
            elif message.HasField("finished"):
                event = view.finished(at, message.finished)
                events += event if journal is None else journal.finished(message.finished, event)
        if events:
            await stream.write(events)
        elif stream.silent:
            await stream.write(KEEP_ALIVE)
        if request.error is not None:
            raise request.error
        if request.delivered:
            return
        await call.stream.wait()


def _check_known(journal: Journal, number: int) -> None:
    if not journal.knows(number):
        raise invalid(_LAST_EVENT_ID, "this event was never sent, or came again under another id")


def _no_stream(problem: Problem) -> HttpError:
    code = "stream_expired" if problem.status == 410 else "stream_not_found"
    return HttpError(replace(problem, param=_LAST_EVENT_ID, code=code))


def headers_of(started: inference_pb2.Started | inference_pb2.CompleteResponse) -> list[tuple[bytes, bytes]]:
    """What is told of a request beside its answer."""
    return [(b"x-request-id", started.request_id.encode()), (b"x-octavo-seed", b"%d" % started.seed)]
