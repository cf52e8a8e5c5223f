"""Requests whose clients are gone, for as long as these may come again (`resume_grace_ms`), at this router.

A parked request runs on; what it makes waits, as for a client that reads slowly. Who comes again says how far it got, and each output
is brought back to there: its tokens are all at hand. A request that ended stays for as long, too, since its last bytes may have been
lost with the connection. How many there are is bounded, and so are the tokens they hold.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.v1 import inference_pb2

from router.hub import ClientStream
from router.idempotency import Claim
from router.output import Output
from router.prepare import Prepared, TextPool
from router.request import Request
from service.errors import FieldViolation, OctavoError, Reason

_MAX_TOKENS = 4 << 20  # of all that are parked, with what may still come
_MAX_EXPIRED = 1_024


class Expired(OctavoError):
    """It was parked here, and its time is over."""


@dataclass(slots=True, eq=False)
class Call:
    """A request that runs for a client, from its submission to its last byte."""

    prepared: Prepared
    stream: ClientStream
    tenant: str
    claim: Claim
    grace: float = 0.0  # seconds that it is kept once its client is gone
    fingerprint: bytes = b""
    view: Any = None  # what its door needs to go on with the answer, and nobody else understands
    holder: asyncio.Task[Any] | None = None  # serves its client
    ended: bool = False  # neither the session nor the gate know of it any more
    taken: asyncio.Future[None] | None = None  # another connection has asked for it; done when its holder has let go
    timer: asyncio.TimerHandle | None = field(default=None)

    @property
    def request(self) -> Request:
        """How it runs."""
        return self.stream.request

    @property
    def request_id(self) -> str:
        """As Started tells it."""
        return self.prepared.started.request_id

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds."""
        return self.request.spec.num_prompt_tokens + sum(len(s.output.token_ids) for s in self.request.sequences)

    def started(self) -> inference_pb2.Started:
        """The first thing that the client is told, and a promise: from now on the request is carried on, not refused."""
        started = self.prepared.started
        started.cached_tokens = self.request.sequences[0].cached_tokens
        self.request.started_told = True
        return started


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a client got with one output."""

    num_tokens: int = 0
    text_bytes: int = 0
    finished: bool = False


class Parking:
    """All calls that may be parked, also while their clients are there. Owned by the event loop."""

    def __init__(self, max_parked: int, max_buffered_tokens: int, end: Callable[[Call], None]) -> None:
        """`end` gives up a call whose time is over. `max_buffered_tokens`: what a running one may still come to hold."""
        self._max_parked = max_parked
        self._buffered = max_buffered_tokens
        self._end = end
        self._calls: dict[str, Call] = {}
        self._parked: dict[str, Call] = {}  # oldest first
        self._expired: dict[str, str] = {}  # tenant by request id

    @property
    def num_parked(self) -> int:
        """Requests without a client."""
        return len(self._parked)

    def join(self, call: Call) -> None:
        """A call that may be parked has a client now."""
        call.holder = asyncio.current_task()
        self._calls[call.request_id] = call

    def leave(self, call: Call) -> None:
        """It is over. Without effect on one that never joined."""
        if call.timer is not None:
            call.timer.cancel()
            call.timer = None
        self._let_go(call)
        self._calls.pop(call.request_id, None)
        self._parked.pop(call.request_id, None)

    def park(self, call: Call) -> bool:
        """Keep a call whose client is gone; False where there is no room for it, or it may not be kept."""
        self._let_go(call)
        if self._calls.get(call.request_id) is not call:
            return False
        if not self._make_room(call):
            self.leave(call)
            return False
        self._parked[call.request_id] = call
        call.timer = asyncio.get_running_loop().call_later(call.grace, self._expire, call)
        return True

    async def take(self, request_id: str, tenant: str) -> Call:
        """The call of this id, for its client who came again. One whose connection has not broken yet is taken from it. Of several
        that come at once the last has it.

        Raises INVALID_ARGUMENT where there is none of this tenant, and Expired where there was one. The caller holds it: join or park.
        """
        call = self._calls.get(request_id)
        while call is not None and call.tenant == tenant and call.holder is not None:
            if call.taken is None:
                call.taken = asyncio.get_running_loop().create_future()
                call.holder.cancel()
            await asyncio.wait([call.taken])
            call = self._calls.get(
                request_id
            )  # its holder has parked it, unless it ended; and another may have been quicker
        if call is None or call.tenant != tenant:
            raise self._missing(request_id, tenant)
        if call.timer is not None:
            call.timer.cancel()
            call.timer = None
        self._parked.pop(request_id, None)
        call.holder, call.taken = asyncio.current_task(), None
        return call

    def find(self, request_id: str, tenant: str) -> Call | None:
        """Whether there is one to be taken."""
        call = self._calls.get(request_id)
        return call if call is not None and call.tenant == tenant else None

    def close(self) -> None:
        """Give up all that have no client."""
        for call in list(self._parked.values()):
            self._expire(call)

    def _let_go(self, call: Call) -> None:
        call.holder = None
        if call.taken is not None and not call.taken.done():
            call.taken.set_result(None)

    def _make_room(self, call: Call) -> bool:
        """Those that ended go first: their clients most likely have everything."""
        ended = [one for one in self._parked.values() if one.ended]
        while True:
            held = sum(one.num_tokens + (0 if one.ended else self._buffered) for one in [*self._parked.values(), call])
            if len(self._parked) < self._max_parked and held <= _MAX_TOKENS:
                return True
            if not ended:
                return False
            self._expire(ended.pop(0))

    def _expire(self, call: Call) -> None:
        self.leave(call)
        self._expired[call.request_id] = call.tenant
        while len(self._expired) > _MAX_EXPIRED:
            del self._expired[next(iter(self._expired))]
        self._end(call)

    def _missing(self, request_id: str, tenant: str) -> OctavoError:
        if self._expired.get(request_id) == tenant:
            return Expired(Reason.INVALID_ARGUMENT, "the time in which this stream could be resumed is over")
        text = "no stream of this id is kept here"
        return OctavoError(Reason.INVALID_ARGUMENT, text, violations=[FieldViolation("resume", text)])


async def rewind(call: Call, marks: Mapping[int, Mark], pool: TextPool) -> None:
    """Bring a call that was taken back to where its client stands; no mark means the beginning. Raises ReplayError."""
    sequences = call.request.sequences
    known = [(s.output, list(s.output.token_ids), marks.get(s.output.index, Mark())) for s in sequences]

    def work() -> list[Output]:
        return [output.rewound(token_ids, mark.num_tokens, mark.text_bytes) for output, token_ids, mark in known]

    outputs = await pool.run_plain(sum(4 * len(token_ids) for _, token_ids, _ in known), work)
    for sequence, output in zip(sequences, outputs, strict=True):
        output.catch_up(sequence.output)
        sequence.output = output
        sequence.finished_sent = marks.get(output.index, Mark()).finished
    call.stream.ready = call.stream.excused = True


def fingerprint(message: inference_pb2.GenerateRequest) -> bytes:
    """Equal for requests that ask for the same, whatever they say of their delivery."""
    asked = inference_pb2.GenerateRequest()
    asked.CopyFrom(message)
    for name in ("resume", "attempt", "idempotency_key", "heartbeats", "resume_grace_ms"):
        asked.ClearField(name)
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).digest()
