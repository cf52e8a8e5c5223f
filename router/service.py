"""InferenceService over gRPC: a thin shell over router/inference.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import grpc
from octavo.v1 import common_pb2, inference_pb2, inference_pb2_grpc

from router.collect import encoded, size_of
from router.hub import heartbeat
from router.inference import Inference
from router.parking import Call
from router.prepare import Prepared
from router.pulse import CALM, Terms
from service.auth import caller_of
from service.errors import OctavoError, Reason, answers_errors
from service.keys import Authenticator

_CHUNK_BYTES = 1 << 20
_LARGE_BYTES = 1 << 20  # an answer that takes some milliseconds to encode


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The public door for gRPC. Every error is a status with a reason of the closed list."""

    def __init__(self, inference: Inference, authenticator: Authenticator) -> None:
        self._inference = inference
        self._authenticator = authenticator

    @answers_errors
    async def Generate(  # type: ignore[override]  # grpc.aio takes coroutines that write, too
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """Streams. A client that hangs up cancels this handler, and with it everything below.

        One that does not read holds it in a write, with what is buffered by then. Its row is freed long before (Hub); it is told
        once it reads: gRPC takes no status while a message waits.
        """
        inference = self._inference

        async def patience(preparing: Awaitable[Prepared]) -> Prepared:
            return await (_beating(preparing, context) if request.heartbeats else preparing)

        async def beat(terms: Terms) -> None:
            await _write(context, inference_pb2.GenerateResponse(heartbeat=heartbeat(terms)))

        tenant, deadline = self._tenant(context), self._deadline(context)
        call: Call | None = None
        try:
            async with inference.running(request, tenant, deadline, bounded=True, patience=patience) as call:
                started = await inference.started(call, beat)
                if request.heartbeats:
                    started.heartbeat.CopyFrom(heartbeat())
                await _write(context, inference_pb2.GenerateResponse(started=started))
                await self._stream(call, context)
        except asyncio.CancelledError:
            # gRPC tells a client nothing of a handler that was cancelled by others.
            if call is not None and call.taken is not None:
                raise OctavoError(Reason.DUPLICATE_REQUEST, "the stream goes on at another connection") from None
            raise

    async def _stream(self, call: Call, context: Any) -> None:
        running, hub, trace = call.request, self._inference.hub, self._inference.hub.trace
        while True:
            began = trace.now() if trace is not None else 0
            messages = hub.outgoing(call.stream)
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
            await call.stream.wait()

    @answers_errors
    async def Complete(  # type: ignore[override]  # service/decoding.py takes what is encoded already
        self, request: inference_pb2.CompleteRequest, context: Any
    ) -> inference_pb2.CompleteResponse | bytes:
        """The same, collected."""
        answer = await self._inference.complete(request.request, self._tenant(context), self._deadline(context))
        return answer if size_of(answer) < _LARGE_BYTES else await encoded(answer)

    @answers_errors
    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        """Text or chat to ids, by the very code that Generate uses."""
        return await self._inference.texts.tokenize(request)

    @answers_errors
    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        """Ids to text."""
        return await self._inference.texts.detokenize(request)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """What some worker holds now."""
        return self._inference.texts.list_models()

    @answers_errors
    async def GetModelAssets(  # type: ignore[override]  # as above
        self, request: inference_pb2.GetModelAssetsRequest, context: Any
    ) -> None:
        """The files, in chunks."""
        _, assets = await self._inference.texts.model(request.model)
        for name, data in assets.files.items():
            for at in range(0, max(len(data), 1), _CHUNK_BYTES):
                chunk = common_pb2.AssetChunk(data=data[at : at + _CHUNK_BYTES])
                if at == 0:
                    chunk.name, chunk.size = name, len(data)
                await context.write(inference_pb2.GetModelAssetsResponse(chunk=chunk))

    def _tenant(self, context: Any) -> str:
        """Whose request it is. The interceptor let it in, but its key may have been taken away since."""
        authenticator = self._authenticator
        caller = caller_of(authenticator, None if authenticator.is_open else context.invocation_metadata())
        if caller is None:
            raise OctavoError(Reason.UNAUTHENTICATED, "the API key is not valid any more")
        return caller.tenant

    def _deadline(self, context: Any) -> float | None:
        remaining = context.time_remaining()
        return None if remaining is None else self._inference.hub.now() + max(0.0, remaining)


async def _beating(preparing: Awaitable[Prepared], context: Any) -> Prepared:
    """Prepare, with a heartbeat whenever that takes long."""
    task = asyncio.ensure_future(preparing)
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
