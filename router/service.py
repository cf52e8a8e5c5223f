"""InferenceService over gRPC: a thin shell. What a request means is in prepare.py, how it runs in session.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc
from octavo.v1 import common_pb2, inference_pb2, inference_pb2_grpc, scheduler_pb2

from router.assets import AssetStore, ModelAssets
from router.gate import Gate
from router.hub import ClientStream, Hub, heartbeat
from router.idempotency import IdempotencyKeys
from router.models import KnownModel
from router.prepare import Preparation, Prepared, TextPool
from router.pulse import CALM
from router.resolve import ModelLimits, check_vocabulary
from router.stats import Stats
from router.validate import MAX_DETOKENIZE_IDS, Violations, check_chat
from service.auth import caller_of
from service.errors import OctavoError, Reason, answers_errors
from service.keys import Authenticator

_CHUNK_BYTES = 1 << 20
# Started waits so long for the first plan, seconds: then it can tell the cached tokens, and a refusal comes as a plain status.
_STARTED_AFTER = 0.1


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The public door. Every error is a status with a reason of the closed list."""

    def __init__(
        self,
        hub: Hub,
        assets: AssetStore,
        preparation: Preparation,
        pool: TextPool,
        stats: Stats,
        gate: Gate,
        authenticator: Authenticator,
    ) -> None:
        self._hub = hub
        self._assets = assets
        self._preparation = preparation
        self._pool = pool
        self._stats = stats
        self._gate = gate
        self._authenticator = authenticator
        self.keys = IdempotencyKeys(hub.now)
        self.draining = False

    @answers_errors
    async def Generate(  # type: ignore[override]  # grpc.aio takes coroutines that write, too
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """Streams. A client that hangs up cancels this handler, and with it everything below.

        One that does not read holds it in a write, with what is buffered by then. Its row is freed long before (Hub); it is told
        once it reads: gRPC takes no status while a message waits.
        """
        async with self._running(request, context, bounded=True) as (prepared, stream):
            await _wait_for_plan(stream, context)
            started = _started(prepared)
            if request.heartbeats:
                started.heartbeat.CopyFrom(heartbeat())
            running = stream.request
            running.started_told = True
            await _write(context, inference_pb2.GenerateResponse(started=started))
            trace = self._hub.trace
            while True:
                began = trace.now() if trace is not None else 0
                messages = self._hub.outgoing(stream)
                encoded = trace.now() if trace is not None else 0
                for message in messages:
                    await _write(context, message)
                if trace is not None and any(message.HasField("delta") for message in messages):
                    trace.add("detokenize", running.spec.seed, began, encoded)
                    trace.add("send", running.spec.seed, encoded)
                if running.error is not None:
                    raise running.error
                if running.delivered:
                    return
                await stream.wait()

    @answers_errors
    async def Complete(self, request: inference_pb2.CompleteRequest, context: Any) -> inference_pb2.CompleteResponse:
        """The same, collected."""
        async with self._running(request.request, context, bounded=False) as (prepared, stream):
            outputs = [inference_pb2.Output(index=s.output.index) for s in stream.request.sequences]
            texts: list[list[str]] = [[] for _ in outputs]
            while not stream.request.done:
                await stream.wait()
                if stream.request.error is not None:
                    raise stream.request.error
            for message in stream.request.take():
                _collect(message, outputs, texts)
            for output, text in zip(outputs, texts, strict=True):
                output.text = "".join(text)
            started = prepared.started
            return inference_pb2.CompleteResponse(
                request_id=started.request_id,
                model=started.model,
                digest=started.digest,
                seed=started.seed,
                outputs=outputs,
            )

    @answers_errors
    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        """Text or chat to ids, by the very code that Generate uses."""
        kind = request.WhichOneof("input")
        wrong = Violations()
        if kind is None:
            wrong.add("input", "one of text and chat must be set")
        elif kind == "chat":
            check_chat(request.chat, wrong)
        wrong.raise_if_any()
        model, assets = await self._model(request.model)
        limits = ModelLimits(model.max_model_len, model.vocab_size)
        prompt, now = "", time.time()
        if kind == "chat":
            prompt, ids = await self._preparation.tokenize_chat(request.chat, assets, limits, now)
        else:
            ids = await self._preparation.tokenize(request, assets, limits, now)
        return inference_pb2.TokenizeResponse(token_ids=ids, prompt=prompt, max_model_len=model.max_model_len)

    @answers_errors
    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        """Ids to text."""
        count = len(request.token_ids)
        wrong = Violations()
        wrong.require(count <= MAX_DETOKENIZE_IDS, "token_ids", f"must have at most {MAX_DETOKENIZE_IDS} entries")
        wrong.raise_if_any()
        model, assets = await self._model(request.model)
        skip = request.skip_special_tokens or not request.HasField("skip_special_tokens")

        def work() -> str:
            ids = list(request.token_ids)
            check_vocabulary("token_ids", ids, model.vocab_size)
            return assets.decode(ids, skip)

        text = await self._pool.run(4 * count, work)
        return inference_pb2.DetokenizeResponse(text=text)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
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
                for model in self._hub.session.models.all()
            ]
        )

    @answers_errors
    async def GetModelAssets(  # type: ignore[override]  # as above
        self, request: inference_pb2.GetModelAssetsRequest, context: Any
    ) -> None:
        """The files, in chunks."""
        _, assets = await self._model(request.model)
        for name, data in assets.files.items():
            for at in range(0, max(len(data), 1), _CHUNK_BYTES):
                chunk = common_pb2.AssetChunk(data=data[at : at + _CHUNK_BYTES])
                if at == 0:
                    chunk.name, chunk.size = name, len(data)
                await context.write(inference_pb2.GetModelAssetsResponse(chunk=chunk))

    async def _model(self, name: str) -> tuple[KnownModel, ModelAssets]:
        model = self._hub.session.models.find(name)
        return model, await self._assets.get(model.digest)

    @asynccontextmanager
    async def _running(
        self, message: inference_pb2.GenerateRequest, context: Any, *, bounded: bool
    ) -> AsyncIterator[tuple[Prepared, ClientStream]]:
        """A request from the gate to its end; leaving it cancels what still runs."""
        tenant = self._tenant(context)
        try:
            if self.draining:
                raise OctavoError(Reason.DRAINING, "this router is shutting down")
            resumed = message.HasField("resume")
            if not resumed:
                self._hub.check_room(message.model, tenant, message.priority)
            self._gate.enter(tenant, self._hub.now(), resumed=resumed)
        except OctavoError as error:
            self._stats.refused(error.reason.name)
            raise
        try:
            try:
                beating = bounded and message.heartbeats
                preparing = self._preparation.prepare(message, tenant, self._deadline(context))
                prepared = await (_beating(preparing, context) if beating else preparing)
                request = prepared.request
                claim = await self.keys.claim(
                    tenant, message.idempotency_key, message.attempt, lambda error: self._hub.fail(request, error)
                )
                try:
                    if request.error is not None:  # another attempt was quicker
                        raise request.error
                    stream = self._hub.submit(request, bounded=bounded, heartbeats=beating)
                except OctavoError:
                    self.keys.release(claim, ran=False)
                    raise
            except OctavoError as error:
                self._stats.refused(error.reason.name)
                raise
            try:
                yield prepared, stream
            finally:
                self._hub.close(stream, scheduler_pb2.CANCEL_REASON_CLIENT)
                self.keys.release(claim, ran=request.delivered and request.error is None)
                self._stats.ended(request, self._hub.now())
        finally:
            self._gate.leave(tenant, self._hub.now())

    def _tenant(self, context: Any) -> str:
        """Whose request it is. The interceptor let it in, but its key may have been taken away since."""
        authenticator = self._authenticator
        caller = caller_of(authenticator, None if authenticator.is_open else context.invocation_metadata())
        if caller is None:
            raise OctavoError(Reason.UNAUTHENTICATED, "the API key is not valid any more")
        return caller.tenant

    def _deadline(self, context: Any) -> float | None:
        remaining = context.time_remaining()
        return None if remaining is None else self._hub.now() + max(0.0, remaining)


async def _beating(preparing: Coroutine[Any, Any, Prepared], context: Any) -> Prepared:
    """Prepare, with a heartbeat whenever that takes long."""
    task = asyncio.create_task(preparing)
    try:
        while not (await asyncio.wait([task], timeout=CALM.interval))[0]:
            await _write(context, inference_pb2.GenerateResponse(heartbeat=heartbeat()))
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _write(context: Any, message: inference_pb2.GenerateResponse) -> None:
    try:
        await context.write(message)
    except grpc.aio.InternalError:  # the connection broke under it; gRPC cancels this handler a moment later
        raise asyncio.CancelledError from None


async def _wait_for_plan(stream: ClientStream, context: Any) -> None:
    """Until the request is planned, or over, or it takes too long to wait with Started: that is a promise, so not before a scheduler
    has the request.
    """
    request = stream.request
    while not (request.done or request.admitted or request.num_buffered):
        try:
            async with asyncio.timeout(_STARTED_AFTER):
                await stream.wait()
        except TimeoutError:
            if request.placed:
                return
        if (terms := stream.beat) is not None:
            stream.beat = None
            await _write(context, inference_pb2.GenerateResponse(heartbeat=heartbeat(terms)))
    if request.error is not None:
        raise request.error


def _started(prepared: Prepared) -> inference_pb2.Started:
    prepared.started.cached_tokens = prepared.request.sequences[0].cached_tokens
    return prepared.started


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
