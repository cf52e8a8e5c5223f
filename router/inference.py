"""What every front door does with a request, whatever it speaks: the way in from the gate, and out again from everything.

The doors (service.py for gRPC, http/ for HTTP) translate to and from the messages of the contracts. What a request means is in
prepare.py, how it runs in session.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from octavo.v1 import inference_pb2, scheduler_pb2

from router.assets import AssetStore
from router.collect import Collector, check_size
from router.gate import Gate
from router.hub import Hub
from router.idempotency import Claim, IdempotencyKeys
from router.output import ReplayError
from router.parking import Call, Mark, Parking, fingerprint, rewind
from router.prepare import Preparation, Prepared, TextPool
from router.pulse import Terms
from router.request import Request
from router.stats import Stats
from router.texts import Texts
from router.validate import Violations, check_request
from service.errors import OctavoError, Reason

# Started waits so long for the first plan, seconds: then it can tell the cached tokens, and a refusal comes as a plain status.
_STARTED_AFTER = 0.1

# Does the waiting that preparing takes; a door may speak meanwhile.
Patience = Callable[[Awaitable[Prepared]], Awaitable[Prepared]]


class Inference:
    """Runs requests of all doors. Owned by the event loop; every error is an OctavoError."""

    def __init__(
        self,
        hub: Hub,
        assets: AssetStore,
        preparation: Preparation,
        pool: TextPool,
        stats: Stats,
        gate: Gate,
        *,
        max_parked: int = 256,
        max_buffered_tokens: int = 4_096,
    ) -> None:
        """`max_parked`: requests that may wait for clients which are gone, with `max_buffered_tokens` each."""
        self.hub = hub
        self.keys = IdempotencyKeys(hub.now)
        self.draining = False
        self.texts = Texts(hub.session.models, assets, preparation, pool)
        self._preparation = preparation
        self._pool = pool
        self._stats = stats
        self._gate = gate
        self.parking = Parking(max_parked, max_buffered_tokens, self._end)

    @asynccontextmanager
    async def running(
        self,
        message: inference_pb2.GenerateRequest,
        tenant: str,
        deadline: float | None,
        *,
        bounded: bool,
        patience: Patience | None = None,
    ) -> AsyncIterator[Call]:
        """A request from the gate to its end; leaving it cancels what still runs, unless it is to be parked.

        `deadline` is on the hub's clock. `bounded`: its reader may be slow, so what it has not taken is limited.
        """
        call = await self._enter(message, tenant, deadline, bounded=bounded, patience=patience)
        async with self._held(call):
            yield call

    @asynccontextmanager
    async def resuming(
        self, request_id: str, tenant: str, stands: Callable[[Call], Mapping[int, Mark]]
    ) -> AsyncIterator[Call]:
        """A parked request, brought to where its client `stands`, by output index, who came again and knows its id.

        Raises INVALID_ARGUMENT where there is none, Expired where there was one, and QUEUE_FULL where it has to come later.
        """
        try:
            call = await self.parking.take(request_id, tenant)
        except OctavoError:
            self._check_open()  # that is why it was given up
            raise
        try:
            await rewind(call, stands(call), self._pool)
            self._check_open()
        except BaseException:
            if self.draining or not self.parking.park(call):
                self._end(call)
            raise
        async with self._held(call):
            yield call

    @asynccontextmanager
    async def _held(self, call: Call) -> AsyncIterator[None]:
        """While a client is there. One that is gone may come again; so may one that has got everything, as far as we know."""
        try:
            yield
        except asyncio.CancelledError:
            request = call.request
            known = request.started_told or request.spec.resumed  # else nobody could ever ask for it
            if call.grace and known and not self.draining and request.error is None and self.parking.park(call):
                self.hub.pause(call.stream)
            else:
                self._end(call)
            raise
        except BaseException:
            self._end(call)
            raise
        if call.grace and call.request.delivered and not self.draining:
            self._release(call)
            self.parking.park(call)
        else:
            self._end(call)

    async def started(
        self, call: Call, beat: Callable[[Terms], Awaitable[None]] | None = None
    ) -> inference_pb2.Started:
        """Until the request is planned, or over, or it takes too long to wait with Started: that is a promise, so not before a
        scheduler has the request. Raises what it ended with. `beat` speaks where a heartbeat is due.
        """
        stream, request = call.stream, call.request
        while not (request.done or request.admitted or request.num_buffered):
            try:
                async with asyncio.timeout(_STARTED_AFTER):
                    await stream.wait()
            except TimeoutError:
                if request.placed:
                    break
            if (terms := stream.beat) is not None and beat is not None:
                stream.beat = None
                await beat(terms)
        if request.error is not None:
            raise request.error
        return call.started()

    async def told(self, call: Call) -> dict[int, tuple[str, bool]]:
        """By output, the text that its client has, and whether it knows of its end."""
        sequences = call.request.sequences

        def work() -> dict[int, tuple[str, bool]]:
            return {one.output.index: (one.output.told(), one.finished_sent) for one in sequences}

        return await self._pool.run_plain(4 * call.num_tokens, work)

    async def complete(
        self,
        message: inference_pb2.GenerateRequest,
        tenant: str,
        deadline: float | None,
        begun: Callable[[Prepared], None] | None = None,
    ) -> inference_pb2.CompleteResponse:
        """Run a request and collect its outputs. `begun` is told how it was prepared."""
        if message.resume_grace_ms:
            wrong = Violations()
            wrong.add("resume_grace_ms", "is for streams only")
            wrong.raise_if_any()
        check_size([message])
        async with self.running(message, tenant, deadline, bounded=False) as call:
            if begun is not None:
                begun(call.prepared)
            request, started = call.request, call.prepared.started
            answer = inference_pb2.CompleteResponse(
                request_id=started.request_id, model=started.model, digest=started.digest, seed=started.seed
            )
            collector = Collector(request, answer)
            while not request.done:
                await call.stream.wait()
                await collector.more()
            if request.error is not None:  # also one that it had from the beginning
                raise request.error
            await collector.finish()
            return answer

    async def drain(self, seconds: float) -> None:
        """Take nothing new, let what runs end in time, its last bytes written; the rest is told to resume at another router."""
        self.draining = True
        self.parking.close()
        hub = self.hub
        deadline = hub.now() + seconds
        while hub.now() < deadline:
            if not hub.session.num_requests and not self._gate.num_inside:
                break
            await asyncio.sleep(0.02)
        for request in hub.session.requests():
            hub.fail(request, OctavoError(Reason.DRAINING, "this router is shutting down; resume at another"))
        hub.detach()

    def _check_open(self) -> None:
        if self.draining:
            raise OctavoError(Reason.DRAINING, "this router is shutting down")

    async def _enter(
        self,
        message: inference_pb2.GenerateRequest,
        tenant: str,
        deadline: float | None,
        *,
        bounded: bool,
        patience: Patience | None,
    ) -> Call:
        """Past the gate and submitted, or adopted where it is parked here. Whoever called must let go of it."""
        try:
            self._check_open()
            resumed = message.HasField("resume")
            if resumed and (call := await self._adopt(message, tenant)) is not None:
                return call
            if not resumed:
                self.hub.check_room(message.model, tenant, message.priority, message.ByteSize())
            self._gate.enter(tenant, self.hub.now(), resumed=resumed)
            try:
                return await self._begin(message, tenant, deadline, bounded=bounded, patience=patience)
            except BaseException:
                self._gate.leave(tenant, self.hub.now())
                raise
        except OctavoError as error:
            self._stats.refused(error.reason.name)
            raise

    async def _begin(
        self,
        message: inference_pb2.GenerateRequest,
        tenant: str,
        deadline: float | None,
        *,
        bounded: bool,
        patience: Patience | None,
    ) -> Call:
        preparing = self._preparation.prepare(message, tenant, deadline)
        prepared = await (preparing if patience is None else patience(preparing))
        request = prepared.request
        claim = await self._claim(message, tenant, request)
        try:
            if request.error is not None:  # another attempt was quicker
                raise request.error
            self._check_open()  # the drain may have begun meanwhile
            stream = self.hub.submit(request, bounded=bounded, heartbeats=bounded and message.heartbeats)
        except OctavoError:
            self.keys.release(claim, ran=False)
            raise
        call = Call(prepared, stream, tenant, claim)
        if message.resume_grace_ms and bounded:
            call.grace, call.fingerprint = message.resume_grace_ms / 1e3, fingerprint(message)
            self.parking.join(call)
        return call

    async def _adopt(self, message: inference_pb2.GenerateRequest, tenant: str) -> Call | None:
        """The call that this resume goes on with, where it is parked here and all that its client wants is still at hand.

        Otherwise it is given up, and the resume is one as at any other router.
        """
        check_request(message)
        ticket = self._preparation.check_ticket(message, tenant)
        if self.parking.find(ticket.request_id, tenant) is None:
            return None
        try:
            call = await self.parking.take(ticket.request_id, tenant)
        except OctavoError:  # it has just ended
            return None
        try:
            adopted = await self._try_adopt(call, message, tenant)
        except asyncio.CancelledError:
            if self.draining or not self.parking.park(call):
                self._end(call)
            if call.taken is not None:  # gRPC would tell this client nothing
                raise OctavoError(Reason.DUPLICATE_REQUEST, "the stream goes on at another connection") from None
            raise
        except BaseException:
            self._end(call)
            raise
        if not adopted:
            self._end(call)
            return None
        return call

    async def _try_adopt(self, call: Call, message: inference_pb2.GenerateRequest, tenant: str) -> bool:
        request = call.request
        if call.view is not None or request.error is not None or call.fingerprint != fingerprint(message):
            return False
        if message.sampling.HasField("logprobs") or message.sampling.HasField("prompt_logprobs"):
            return False  # those that were taken are gone
        marks: dict[int, Mark] = {}
        for state in message.resume.outputs:
            known = request.sequences[state.index].output.token_ids[: len(state.token_ids)]
            if list(state.token_ids) != list(known):
                return False
            marks[state.index] = Mark(len(known), state.text_bytes, state.finished)
        try:
            await rewind(call, marks, self._pool)
        except ReplayError:
            return False
        if call.claim.key or message.idempotency_key:
            self.keys.release(call.claim, ran=False)
            call.claim = await self._claim(message, tenant, request)
        self._check_open()
        self.hub.resume(call.stream, heartbeats=message.heartbeats)
        return True

    async def _claim(self, message: inference_pb2.GenerateRequest, tenant: str, request: Request) -> Claim:
        return await self.keys.claim(
            tenant, message.idempotency_key, message.attempt, lambda error: self.hub.fail(request, error)
        )

    def _end(self, call: Call) -> None:
        """Nobody will ask for it any more."""
        self.parking.leave(call)
        self._release(call)

    def _release(self, call: Call) -> None:
        """It runs no more; what still does is cancelled. One that ended before has a claim and a pulse again, if it was adopted."""
        request, now = call.request, self.hub.now()
        self.keys.release(call.claim, ran=(call.ended or request.delivered) and request.error is None)
        if call.ended:
            self.hub.pause(call.stream)
            return
        call.ended = True
        self.hub.close(call.stream, scheduler_pb2.CANCEL_REASON_CLIENT)
        self._stats.ended(request, now)
        self._gate.leave(call.tenant, now)
