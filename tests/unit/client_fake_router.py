"""A real gRPC server that plays a router by a script, in a thread of its own so that sync clients and commands can use it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from octavo.v1 import common_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from octavo.v1 import inference_pb2 as pb

from service.errors import OctavoError, Reason, abort

DIGEST = "ab" * 32
TICKET = b"ticket"
SEED = 4711


@dataclass
class Play:
    """How one Generate call goes. Tokens are counted over the whole request, those before a resume included."""

    refuse: OctavoError | None = None  # instead of Started
    break_at: int | None = None  # tokens after which the stream breaks
    error: OctavoError | None = None  # how it breaks; None: it just ends
    code: grpc.StatusCode | None = None  # breaks with this code and no details
    hang_at: int | None = None  # tokens after which nothing comes any more
    skip_bytes: int = 0  # lies about text_bytes
    digest: str = DIGEST
    gate: threading.Event | None = None  # Started comes only when it is set
    terms: pb.Heartbeat | None = None  # told in Started, if the client asked for heartbeats


def word(index: int) -> str:
    """Text of output token `index`; two bytes and four among them."""
    return f"{index}é🐙 "


def whole_text(count: int) -> str:
    return "".join(map(word, range(count)))


class _Ends(Exception):
    """The stream of a play ends early with status OK."""


@dataclass
class FakeRouter(inference_pb2_grpc.InferenceServiceServicer, scheduler_pb2_grpc.SchedulerServiceServicer):
    """Use as a context manager. Each Generate takes the next play, the last one plays on."""

    plays: list[Play] = field(default_factory=lambda: [Play()])
    model: str = "fake"
    token: str | None = None
    unary_errors: list[OctavoError] = field(default_factory=list)  # of Complete, Tokenize and so on, one a call
    workers: list[scheduler_pb2.WorkerStatus] = field(default_factory=list)
    inspections: list[scheduler_pb2.InspectResponse] = field(default_factory=list)
    unready: int = 0  # calls of ListModels until the model is ready

    def __post_init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.unary: list[Any] = []
        self.deadlines: list[float | None] = []
        self.cancelled = threading.Semaphore(0)
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeRouter:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def kill(self) -> None:
        """Cut every connection."""
        self._run(self._server.stop(None))

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def _make_server(self) -> grpc.aio.Server:
        return grpc.aio.server()

    async def _start(self) -> None:
        self._server = self._make_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def _authorise(self, context: Any) -> None:
        if self.token and ("authorization", f"Bearer {self.token}") not in tuple(context.invocation_metadata()):
            await abort(context, OctavoError(Reason.UNAUTHENTICATED, "no token"))

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        await self._authorise(context)
        copy = pb.GenerateRequest()
        copy.CopyFrom(request)
        self.requests.append(copy)
        self.deadlines.append(context.time_remaining())
        play = self.plays.pop(0) if len(self.plays) > 1 else self.plays[0]
        try:
            async for response in self._play(request, play, context):
                yield response
        except _Ends:
            return
        except (asyncio.CancelledError, GeneratorExit):  # the latter if it was sending just then
            self.cancelled.release()
            raise

    async def _play(self, request: pb.GenerateRequest, play: Play, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if play.refuse:
            await abort(context, play.refuse)
        if play.gate:
            await asyncio.to_thread(play.gate.wait, 20)
        started = pb.Started(request_id="r1", model=self.model, digest=play.digest, seed=SEED, ticket=TICKET)
        if request.heartbeats and play.terms is not None:
            started.heartbeat.CopyFrom(play.terms)
        yield pb.GenerateResponse(started=started)
        total = request.sampling.max_tokens or 6
        outputs = request.sampling.n or 1
        held = {state.index: state for state in request.resume.outputs}
        for index in range(outputs):
            state = held.get(index, pb.ResumeState())
            if state.finished:
                continue
            assert state.text_bytes == len(whole_text(len(state.token_ids)).encode())
            async for response in self._output(index, len(state.token_ids), total, play, context):
                yield response

    async def _output(
        self, index: int, position: int, total: int, play: Play, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        while position < total:
            if play.hang_at is not None and position >= play.hang_at:
                await asyncio.sleep(60)
            if play.break_at is not None and position >= play.break_at:
                if play.code:
                    await context.abort(play.code, "broken")
                if play.error:
                    await abort(context, play.error)
                raise _Ends
            size = min(2, total - position)
            text = "".join(map(word, range(position, position + size)))
            held_bytes = len(whole_text(position + size).encode()) + play.skip_bytes
            ids = range(1000 + position, 1000 + position + size)
            yield pb.GenerateResponse(delta=pb.Delta(index=index, text=text, token_ids=ids, text_bytes=held_bytes))
            position += size
        usage = pb.Usage(prompt_tokens=3, completion_tokens=total)
        finished = pb.Finished(index=index, finish_reason=common_pb2.FINISH_REASON_LENGTH, usage=usage)
        yield pb.GenerateResponse(finished=finished)

    async def _answer(self, request: Any, context: Any) -> None:
        await self._authorise(context)
        self.unary.append(request)
        if self.unary_errors:
            await abort(context, self.unary_errors.pop(0))

    async def Complete(self, request: pb.CompleteRequest, context: Any) -> pb.CompleteResponse:
        await self._answer(request, context)
        output = pb.Output(text=whole_text(2), token_ids=[1000, 1001])
        return pb.CompleteResponse(request_id="r1", model=self.model, outputs=[output])

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        await self._answer(request, context)
        text = request.text or "".join(part.text for turn in request.chat.messages for part in turn.content)
        return pb.TokenizeResponse(token_ids=text.encode(), max_model_len=64)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        await self._answer(request, context)
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        await self._answer(request, context)
        self.unready -= self.unready > 0
        ready = not self.unready
        model = pb.Model(
            name=self.model,
            digest=DIGEST,
            max_model_len=64,
            vocab_size=500,
            workers=1,
            ready=ready,
            quantization="int8",
        )
        return pb.ListModelsResponse(models=[model])

    async def GetModelAssets(
        self, request: pb.GetModelAssetsRequest, context: Any
    ) -> AsyncIterator[pb.GetModelAssetsResponse]:
        await self._answer(request, context)
        for chunk in (
            common_pb2.AssetChunk(name="a.json", size=4, data=b"ab"),
            common_pb2.AssetChunk(data=b"cd"),
            common_pb2.AssetChunk(name="b.txt", size=1, data=b"x"),
        ):
            yield pb.GetModelAssetsResponse(chunk=chunk)

    async def ListWorkers(self, request: Any, context: Any) -> scheduler_pb2.ListWorkersResponse:
        await self._answer(request, context)
        return scheduler_pb2.ListWorkersResponse(workers=self.workers)

    async def DrainWorker(self, request: Any, context: Any) -> scheduler_pb2.DrainWorkerResponse:
        await self._answer(request, context)
        return scheduler_pb2.DrainWorkerResponse()

    async def AdmitDigest(self, request: Any, context: Any) -> scheduler_pb2.AdmitDigestResponse:
        await self._answer(request, context)
        return scheduler_pb2.AdmitDigestResponse()

    async def Inspect(self, request: Any, context: Any) -> AsyncIterator[scheduler_pb2.InspectResponse]:
        await self._answer(request, context)
        for message in self.inspections[:1] if request.once else self.inspections:
            yield message
