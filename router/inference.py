"""What every front door does with a request, whatever it speaks: the way in from the gate, and out again from everything.

The doors (service.py for gRPC, http/ for HTTP) translate to and from the messages of the contracts. What a request means is in
prepare.py, how it runs in session.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from octavo.v1 import inference_pb2, scheduler_pb2

from router.assets import AssetStore, ModelAssets
from router.gate import Gate
from router.hub import ClientStream, Hub
from router.idempotency import Claim, IdempotencyKeys
from router.models import KnownModel
from router.prepare import Preparation, Prepared, TextPool
from router.pulse import Terms
from router.request import Request
from router.resolve import ModelLimits, check_vocabulary
from router.stats import Stats
from router.validate import MAX_DETOKENIZE_IDS, Violations, check_chat
from service.errors import OctavoError, Reason

# Started waits so long for the first plan, seconds: then it can tell the cached tokens, and a refusal comes as a plain status.
_STARTED_AFTER = 0.1

# Does the waiting that preparing takes; a door may speak meanwhile.
Patience = Callable[[Awaitable[Prepared]], Awaitable[Prepared]]


@dataclass(slots=True, eq=False)
class Call:
    """A request that runs for a client, from its submission to its last byte."""

    prepared: Prepared
    stream: ClientStream
    tenant: str
    claim: Claim

    @property
    def request(self) -> Request:
        """How it runs."""
        return self.stream.request

    def started(self) -> inference_pb2.Started:
        """The first thing that the client is told, and a promise: from now on the request is carried on, not refused."""
        started = self.prepared.started
        started.cached_tokens = self.request.sequences[0].cached_tokens
        self.request.started_told = True
        return started


class Inference:
    """Runs requests of all doors. Owned by the event loop; every error is an OctavoError."""

    def __init__(
        self, hub: Hub, assets: AssetStore, preparation: Preparation, pool: TextPool, stats: Stats, gate: Gate
    ) -> None:
        self.hub = hub
        self.keys = IdempotencyKeys(hub.now)
        self.draining = False
        self._assets = assets
        self._preparation = preparation
        self._pool = pool
        self._stats = stats
        self._gate = gate

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
        """A request from the gate to its end; leaving it cancels what still runs.

        `deadline` is on the hub's clock. `bounded`: its reader may be slow, so what it has not taken is limited.
        """
        try:
            if self.draining:
                raise OctavoError(Reason.DRAINING, "this router is shutting down")
            resumed = message.HasField("resume")
            if not resumed:
                self.hub.check_room(message.model, tenant, message.priority)
            self._gate.enter(tenant, self.hub.now(), resumed=resumed)
        except OctavoError as error:
            self._stats.refused(error.reason.name)
            raise
        try:
            try:
                call = await self._begin(message, tenant, deadline, bounded=bounded, patience=patience)
            except OctavoError as error:
                self._stats.refused(error.reason.name)
                raise
            try:
                yield call
            finally:
                self._end(call)
        finally:
            self._gate.leave(tenant, self.hub.now())

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

    async def complete(
        self, message: inference_pb2.GenerateRequest, tenant: str, deadline: float | None
    ) -> inference_pb2.CompleteResponse:
        """Run a request and collect its outputs."""
        async with self.running(message, tenant, deadline, bounded=False) as call:
            request = call.request
            outputs = [inference_pb2.Output(index=s.output.index) for s in request.sequences]
            texts: list[list[str]] = [[] for _ in outputs]
            while not request.done:
                await call.stream.wait()
                if request.error is not None:
                    raise request.error
            for event in request.take():
                _collect(event, outputs, texts)
            for output, text in zip(outputs, texts, strict=True):
                output.text = "".join(text)
            started = call.prepared.started
            return inference_pb2.CompleteResponse(
                request_id=started.request_id,
                model=started.model,
                digest=started.digest,
                seed=started.seed,
                outputs=outputs,
            )

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        """Text or chat to ids, by the very code that requests are prepared with."""
        kind = request.WhichOneof("input")
        wrong = Violations()
        if kind is None:
            wrong.add("input", "one of text and chat must be set")
        elif kind == "chat":
            check_chat(request.chat, wrong)
        wrong.raise_if_any()
        model, assets = await self.model(request.model)
        limits = ModelLimits(model.max_model_len, model.vocab_size)
        prompt, now = "", time.time()
        if kind == "chat":
            prompt, ids = await self._preparation.tokenize_chat(request.chat, assets, limits, now)
        else:
            ids = await self._preparation.tokenize(request, assets, limits, now)
        return inference_pb2.TokenizeResponse(token_ids=ids, prompt=prompt, max_model_len=model.max_model_len)

    async def detokenize(self, request: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeResponse:
        """Ids to text."""
        count = len(request.token_ids)
        wrong = Violations()
        wrong.require(count <= MAX_DETOKENIZE_IDS, "token_ids", f"must have at most {MAX_DETOKENIZE_IDS} entries")
        wrong.raise_if_any()
        model, assets = await self.model(request.model)
        skip = request.skip_special_tokens or not request.HasField("skip_special_tokens")

        def work() -> str:
            ids = list(request.token_ids)
            check_vocabulary("token_ids", ids, model.vocab_size)
            return assets.decode(ids, skip)

        text = await self._pool.run(4 * count, work)
        return inference_pb2.DetokenizeResponse(text=text)

    def models(self) -> inference_pb2.ListModelsResponse:
        """What some worker holds now."""
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    name=model.name,
                    digest=model.digest.hex(),
                    max_model_len=model.max_model_len,
                    vocab_size=model.vocab_size,
                    workers=model.workers,
                    ready=self._assets.ready(model.digest),
                )
                for model in self.hub.session.models.all()
            ]
        )

    async def model(self, name: str) -> tuple[KnownModel, ModelAssets]:
        """The model of this name with its text side."""
        model = self.hub.session.models.find(name)
        return model, await self._assets.get(model.digest)

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
        claim = await self.keys.claim(
            tenant, message.idempotency_key, message.attempt, lambda error: self.hub.fail(request, error)
        )
        try:
            if request.error is not None:  # another attempt was quicker
                raise request.error
            stream = self.hub.submit(request, bounded=bounded, heartbeats=bounded and message.heartbeats)
        except OctavoError:
            self.keys.release(claim, ran=False)
            raise
        return Call(prepared, stream, tenant, claim)

    def _end(self, call: Call) -> None:
        request = call.request
        self.hub.close(call.stream, scheduler_pb2.CANCEL_REASON_CLIENT)
        self.keys.release(call.claim, ran=request.delivered and request.error is None)
        self._stats.ended(request, self.hub.now())


def _collect(
    message: inference_pb2.GenerateResponse, outputs: list[inference_pb2.Output], texts: list[list[str]]
) -> None:
    if message.HasField("delta"):
        delta = message.delta
        texts[delta.index].append(delta.text)
        output = outputs[delta.index]
        output.token_ids.extend(delta.token_ids)
        output.logprobs.extend(delta.logprobs)
        output.prompt_logprobs.extend(delta.prompt_logprobs)
        return
    finished = message.finished
    output = outputs[finished.index]
    output.finish_reason = finished.finish_reason
    if finished.HasField("stop_match"):
        output.stop_match.CopyFrom(finished.stop_match)
    output.usage.CopyFrom(finished.usage)
    output.timing.CopyFrom(finished.timing)
