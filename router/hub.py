"""Between the session and the gRPC shells: clocks, queues and wake-ups of one router process, all on one event loop."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.v1 import inference_pb2, scheduler_pb2

from router.collect import MAX_WHOLE_BYTES
from router.flush import FlushPolicy
from router.pulse import BRISK, CALM, Pulse, Terms
from router.request import BYTES_A_LOGPROB, Request
from router.resolve import MAX_PROMPT_LOGPROBS
from router.session import RouterSession
from service.errors import OctavoError, Reason
from service.trace import Trace

_MAX_OUTBOUND = 65_536
_WAKES_A_TURN = 16  # each writes a message: half a millisecond together
_MAX_COLLECTED_BYTES = MAX_WHOLE_BYTES
_MOST_BYTES_A_TOKEN = 1_024  # of an answer, with all log-probabilities that may be asked for


class Outbound:
    """Messages that wait to be written to one scheduler. Closed when its stream has to end."""

    def __init__(self) -> None:
        self._messages: collections.deque[scheduler_pb2.AttachRequest] = collections.deque()
        self._wake = asyncio.Event()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def closed(self) -> bool:
        """Whether the stream has to end; `ended` can be awaited."""
        return self.ended.done()

    def put(self, message: scheduler_pb2.AttachRequest) -> None:
        """Append. A queue that nobody empties closes: that scheduler does not read."""
        if len(self._messages) >= _MAX_OUTBOUND:
            self.close()
        if not self.closed:
            self._messages.append(message)
            self._wake.set()

    def close(self) -> None:
        """End the stream; what waits is lost with it."""
        if not self.ended.done():
            self.ended.set_result(None)
        self._messages.clear()
        self._wake.set()

    async def get(self) -> scheduler_pb2.AttachRequest | None:
        """The next message, or None once closed."""
        while not self._messages and not self.closed:
            self._wake.clear()
            await self._wake.wait()
        return self._messages.popleft() if self._messages else None


@dataclass(slots=True, eq=False)
class ClientStream:
    """A client that waits for its request. `ready` is set by the hub and cleared by the one reader."""

    request: Request
    bounded: bool
    beating: bool = False  # its client asked for heartbeats
    ready: bool = False
    beat: Terms | None = None  # a heartbeat is due
    excused: bool = False  # until it reads: what waits is no fault of its reader
    _waiter: asyncio.Future[None] | None = field(default=None)

    async def wait(self) -> None:
        """Until the hub says that there is something to write (or the request is over)."""
        if not self.ready:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self.ready = False

    def wake(self) -> None:
        """There is something to write."""
        self.ready = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def heartbeat(terms: Terms = CALM) -> inference_pb2.Heartbeat:
    """The message that tells a client these terms."""
    return inference_pb2.Heartbeat(interval_ms=round(terms.interval * 1e3), lease_ms=round(terms.lease * 1e3))


class Hub:
    """Owns the session and calls it with the time."""

    def __init__(
        self,
        session: RouterSession,
        *,
        flush_interval: float = 0.008,
        max_buffered_tokens: int = 4_096,
        brisk: Terms = BRISK,
        on_models: Callable[[], None] = lambda: None,
    ) -> None:
        """`brisk`: heartbeats to clients that have got tokens. `on_models` is called whenever the models served may have changed."""
        self.session = session
        self.leaving = asyncio.Event()  # goodbye was said: nobody is to be dialled any more
        self._flush: FlushPolicy[ClientStream] = FlushPolicy(flush_interval)
        self._flush_timer: asyncio.TimerHandle | None = None
        self._pulse: Pulse[ClientStream] = Pulse(brisk)
        self._streams: dict[Request, ClientStream] = {}
        self._outbound: dict[str, Outbound] = {}
        self._max_buffered = max_buffered_tokens
        room = _MAX_COLLECTED_BYTES - BYTES_A_LOGPROB * MAX_PROMPT_LOGPROBS
        self._surely_allowed = min(max_buffered_tokens, room // _MOST_BYTES_A_TOKEN)
        self._on_models = on_models
        self._loop = asyncio.get_running_loop()
        self.trace: Trace | None = None

    def now(self) -> float:
        """Seconds on the session's clock. Not the loop's: uvloop's stands still, in whole milliseconds, during an iteration."""
        return time.monotonic()

    # ---- schedulers

    def link_opened(self, address: str) -> Outbound:
        """A stream to this scheduler is open; its writer empties the queue returned."""
        outbound = Outbound()
        self._outbound[address] = outbound
        self.session.link_opened(address, self.now())
        self._pump()
        return outbound

    def link_closed(self, address: str) -> None:
        """It has ended."""
        outbound = self._outbound.pop(address, None)
        if outbound is not None:
            outbound.close()
        self.session.link_closed(address, self.now())
        self._on_models()
        self._pump()

    def receive(self, address: str, message: scheduler_pb2.AttachResponse) -> None:
        """A message came from a scheduler."""
        began = self.trace.now() if self.trace is not None else 0
        self.session.receive(address, message, self.now())
        if message.HasField("models") or message.HasField("welcome"):
            self._on_models()
        self._pump()
        if self.trace is not None and message.HasField("tokens"):
            self.trace.add("receive tokens", 0, began)

    async def run_clock(self, interval: float) -> None:
        """Tick for ever. `interval` in seconds: a few in each heartbeat."""
        while True:
            now = self.now()
            self.session.tick(now)
            for stream, terms in self._pulse.due(now):
                stream.beat = terms
                stream.wake()
            self._pump()
            await asyncio.sleep(interval)

    # ---- clients

    def check_room(self, model: str, tenant: str, priority: int, size: int) -> None:
        """Whether it is worth while to prepare a request of this kind. Raises QUEUE_FULL, or what an unknown model raises."""
        self.session.check_room(model, tenant, priority, size, self.now())

    def submit(self, request: Request, *, bounded: bool, heartbeats: bool = False) -> ClientStream:
        """Start a request. `bounded`: its reader may be slow, so what it has not taken is limited. Raises OctavoError."""
        now = self.now()
        self.session.submit(request, now)
        stream = ClientStream(request, bounded, heartbeats)
        self._streams[request] = stream
        if heartbeats:
            self._pulse.join(stream, now)
        self._pump()
        return stream

    def outgoing(self, stream: ClientStream) -> list[inference_pb2.GenerateResponse]:
        """What this stream has to write now, heartbeats among it. Writing counts as speaking."""
        messages = stream.request.take()
        stream.excused = False
        if not stream.beating:
            return messages
        terms, stream.beat = stream.beat, None
        now = self.now()
        if any(message.HasField("delta") for message in messages):
            terms = self._pulse.hasten(stream, now)
        if terms is not None and (messages or not stream.request.done):
            messages.insert(0, inference_pb2.GenerateResponse(heartbeat=heartbeat(terms)))
        if messages:
            self._pulse.spoke(stream, now)
        return messages

    def close(self, stream: ClientStream, reason: scheduler_pb2.CancelReason) -> None:
        """The client is served or gone: whatever still runs is cancelled."""
        self._pulse.leave(stream)
        self._streams.pop(stream.request, None)
        self._flush.forget(stream)
        self.session.cancel(stream.request, reason, self.now())
        self._pump()

    def pause(self, stream: ClientStream) -> None:
        """The client is gone and may come again; the request runs on."""
        self._pulse.leave(stream)
        self._flush.forget(stream)

    def resume(self, stream: ClientStream, *, heartbeats: bool) -> None:
        """Its client is there again."""
        if heartbeats:
            self._pulse.join(stream, self.now())

    def fail(self, request: Request, error: OctavoError) -> None:
        """End a request with an error of the router's own."""
        self.session.fail(request, error, scheduler_pb2.CANCEL_REASON_UNSPECIFIED, self.now())
        self._pump()

    def detach(self) -> None:
        """Say goodbye to all schedulers; they end the streams."""
        self.leaving.set()
        self.session.detach()
        self._perform()

    # ---- what the session wants done

    def _pump(self) -> None:
        now = self.now()
        for request in self.session.take_changed():
            stream = self._streams.get(request)
            if stream is None:
                continue
            if request.error is None:
                waits = request.num_buffered if stream.bounded else request.num_output_tokens
                if waits > self._surely_allowed:
                    self._bound(stream, waits, now)
            if request.error is not None or self._flush.mark(stream, now):
                stream.wake()
        self._arm()
        self._perform()

    def _bound(self, stream: ClientStream, waits: int, now: float) -> None:
        """End a request of which more tokens wait than may: for a client that does not read, or for an answer that is whole or
        nothing. Those whose parameters say that they may become too large were refused (router/collect.py).
        """
        request = stream.request
        if stream.excused:
            return
        if stream.bounded:
            if waits > self._max_buffered:
                message = f"{waits} tokens wait for the client, which does not read them"
                error = OctavoError(Reason.SLOW_CONSUMER, message)
                self.session.fail(request, error, scheduler_pb2.CANCEL_REASON_SLOW_CONSUMER, now)
        elif request.bytes_so_far > _MAX_COLLECTED_BYTES:
            message = (
                f"an answer of {waits} tokens and more, with what was asked for, fits into no message: stream it (over gRPC:"
                " use Generate), or set max_tokens"
            )
            error = OctavoError(Reason.UNSUPPORTED, message)
            self.session.fail(request, error, scheduler_pb2.CANCEL_REASON_UNSPECIFIED, now)

    def _arm(self) -> None:
        due_at = self._flush.due_at
        if due_at is not None and self._flush_timer is None:
            self._flush_timer = self._loop.call_later(max(0.0, due_at - self.now()), self._end_window)

    def _perform(self) -> None:
        actions = self.session.take_actions()
        for address, message in actions.messages:
            outbound = self._outbound.get(address)
            if outbound is not None:
                outbound.put(message)
        for address in actions.cut:
            cut = self._outbound.pop(address, None)
            if cut is not None:
                cut.close()
        if actions.cut:
            self._on_models()

    def _end_window(self) -> None:
        self._flush_timer = None
        now, due_at = self.now(), self._flush.due_at
        if due_at is None or due_at > now + 1e-3:  # the streams it was set for are gone
            self._arm()
            return
        self._wake(collections.deque(self._flush.take(now)))

    def _wake(self, streams: collections.deque[ClientStream]) -> None:
        """Some in this turn of the loop, the others in the next: what schedulers send is read in between, not after all writes."""
        for _ in range(min(_WAKES_A_TURN, len(streams))):
            streams.popleft().wake()
        if streams:
            self._loop.call_soon(self._wake, streams)
