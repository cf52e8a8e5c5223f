"""The client for asyncio. It is the same as octavo.client.sync, call by call; what both decide is in session and retry."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc
import grpc.aio
from octavo.client.assets import assemble
from octavo.client.connection import Connection, connect_to
from octavo.client.errors import OctavoError, decode
from octavo.client.request import (
    GenerateOptions,
    Message,
    chat_request,
    complete_request,
    prompt_request,
    tokenize_request,
)
from octavo.client.retry import Attempts, RetryPolicy
from octavo.client.session import Collector, Event, GenerateSession
from octavo.client.silence import Silence
from octavo.client.sync import LOOKUP_TIMEOUT
from octavo.v1 import inference_pb2 as pb
from octavo.v1.inference_pb2_grpc import InferenceServiceStub

T = TypeVar("T")


class AsyncStream:
    """The events of one generation: Started, then Deltas and one Finished for each output.

    It resumes by itself when it breaks. Closing it, leaving its `async with` block or cancelling the task that reads cancels
    the request.
    """

    def __init__(self, client: AsyncClient, request: pb.GenerateRequest, timeout: float | None) -> None:
        self._client = client
        self._attempts = client._attempts(timeout)
        self._session = GenerateSession(request, self._attempts)
        self._call: Any = None
        self._reading = False
        self._fell_silent = False  # the present call was cancelled because its router said nothing
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        # Set once; also wakes a wait between two tries.
        self._closed = asyncio.Event()

    @property
    def started(self) -> pb.Started | None:
        """The first message, with request id and seed, once it has come."""
        return self._session.started

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event. Raises OctavoError."""
        while not self._closed.is_set():
            error = None
            try:
                response = await self._read()
            except grpc.RpcError as rpc_error:
                response, error = None, decode(rpc_error)
            if self._fell_silent:
                response, error = None, self._session.fell_silent()
            if response is None:
                await self._after_break(error)
                continue
            event = self._receive(response)
            if event is not None:
                return event
        raise StopAsyncIteration

    async def text(self) -> AsyncIterator[str]:
        """Pieces of the text of output 0, as they come."""
        async for event in self:
            if isinstance(event, pb.Delta) and event.index == 0 and event.text:
                yield event.text

    async def result(self) -> pb.CompleteResponse:
        """Reads to the end and returns the whole answer. Raises OctavoError."""
        collector = Collector()
        async for event in self:
            collector.add(event)
        return collector.response()

    async def aclose(self) -> None:
        """Cancel what still runs. Another task that iterates then ends its iteration."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    def _cancel(self) -> None:
        self._closed.set()
        self._stop_listening()
        if self._call is not None:
            self._call.cancel()

    async def _read(self) -> pb.GenerateResponse | None:
        if self._call is None:
            remaining = self._attempts.remaining(time.monotonic())
            stub = self._client._stub(self._attempts.router)
            self._call = stub.Generate(
                self._session.next_request(), timeout=remaining, metadata=self._client._connection.metadata
            )
            self._fell_silent = False
            if self._session.silence is not None:
                self._session.silence.dialled(time.monotonic())
        self._listen()
        try:
            response = await self._call.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if (self._closed.is_set() or self._fell_silent) and not (task and task.cancelling()):
                return None  # the call was cancelled by us, nobody cancelled the task
            self._cancel()
            raise
        finally:
            self._reading = False
        return None if response is grpc.aio.EOF else cast(pb.GenerateResponse, response)

    def _receive(self, response: pb.GenerateResponse) -> Event | None:
        try:
            return self._session.receive(response)
        except OctavoError:
            self._cancel()
            raise

    def _listen(self) -> None:
        """A read begins: have the silence judged while it lasts. One timer a stream, moved on when it fires."""
        self._reading = True
        silence = self._session.silence
        if silence is not None:
            now = time.monotonic()
            silence.listening(now)
            if silence.due_at < self._timer_at:  # none is set, or the terms have become shorter
                self._set_timer(silence, now)

    def _set_timer(self, silence: Silence, now: float) -> None:
        self._stop_listening()
        self._timer_at = silence.due_at
        self._timer = asyncio.get_running_loop().call_later(max(0.0, silence.due_at - now), self._judge)

    def _judge(self) -> None:
        self._stop_listening()
        silence, now = self._session.silence, time.monotonic()
        if silence is None or not self._reading or self._call is None:
            return  # the next read sets a timer
        if silence.over(now):
            self._fell_silent = True
            self._call.cancel()
        else:
            self._set_timer(silence, now)

    def _stop_listening(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, math.inf

    async def _after_break(self, error: OctavoError | None) -> None:
        self._call = None
        self._stop_listening()
        if self._session.complete or self._closed.is_set():
            self._closed.set()
            self._client._prefer(self._attempts.router)
            return
        try:
            delay = self._session.broke(error, time.monotonic())
        except OctavoError:
            self._closed.set()
            raise
        try:
            async with asyncio.timeout(delay):
                await self._closed.wait()
        except TimeoutError:
            return  # the wait is over and nobody closed the stream


class AsyncClient:
    """Talks to the routers of a cluster. Raises OctavoError from every call; ConnectionProblem from the constructor."""

    def __init__(
        self,
        address: str | Sequence[str] | Connection | None = None,
        *,
        token: str | None = None,
        tls: bool = False,
        tls_ca: Path | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """`address`: one or several routers; by default OCTAVO_ADDRESS, then what `make up` started here, then 127.0.0.1:50051."""
        if isinstance(address, Connection):
            self._connection = address
        else:
            self._connection = connect_to(address, token=token, tls=tls, tls_ca=tls_ca)
        self._retry = retry or RetryPolicy()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._preferred = 0  # router that answered last

    def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """Continue a text, or token ids. `timeout` in seconds bounds the whole generation, resumes included."""
        return AsyncStream(self, prompt_request(prompt, options), timeout)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """Answer a conversation, rendered by the model's chat template."""
        return AsyncStream(self, chat_request(messages, options, tools=tools), timeout)

    def stream(self, request: pb.GenerateRequest, *, timeout: float | None = None) -> AsyncStream:
        """Any request of the contracts. It is copied."""
        copy = pb.GenerateRequest()
        copy.CopyFrom(request)
        return AsyncStream(self, copy, timeout)

    async def complete(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> pb.CompleteResponse:
        """The whole answer at once, to a prompt or to messages."""
        request = complete_request(prompt, messages, options)
        if len(self._connection.addresses) > 1:  # a stream goes on at another router, where an answer would start again
            async with self.stream(request.request, timeout=timeout) as stream:
                return await stream.result()
        base = request.request.attempt

        def invoke(stub: Any, count: int, **call: Any) -> Awaitable[pb.CompleteResponse]:
            request.request.attempt = base + count  # so that a key that ran for an answer that was lost runs again
            return cast(Awaitable[pb.CompleteResponse], stub.Complete(request, **call))

        return await self._unary_counted(timeout, invoke)

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        model: str = "",
        add_special_tokens: bool | None = None,
    ) -> pb.TokenizeResponse:
        """Token ids of a text or of messages, exactly as generating would see them."""
        request = tokenize_request(text, messages, model, add_special_tokens)
        return await self._unary(LOOKUP_TIMEOUT, lambda stub, **call: stub.Tokenize(request, **call))

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool | None = None
    ) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        response: pb.DetokenizeResponse = await self._unary(
            LOOKUP_TIMEOUT, lambda stub, **call: stub.Detokenize(request, **call)
        )
        return response.text

    async def list_models(self) -> list[pb.Model]:
        """The models that can be asked for now."""
        response: pb.ListModelsResponse = await self._unary(
            LOOKUP_TIMEOUT, lambda stub, **call: stub.ListModels(pb.ListModelsRequest(), **call)
        )
        return list(response.models)

    async def get_model_assets(self, model: str = "") -> dict[str, bytes]:
        """Tokenizer, template and configuration of a model: file name to content."""
        request = pb.GetModelAssetsRequest(model=model)

        async def read(stub: Any, **call: Any) -> dict[str, bytes]:
            return assemble([item.chunk async for item in stub.GetModelAssets(request, **call)])

        return await self._unary(LOOKUP_TIMEOUT, read)

    async def aclose(self) -> None:
        """Close the connections; what still runs is cancelled."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _attempts(self, timeout: float | None) -> Attempts:
        deadline = None if timeout is None else time.monotonic() + timeout
        return Attempts(self._retry, len(self._connection.addresses), first=self._preferred, deadline=deadline)

    def _prefer(self, router: int) -> None:
        self._preferred = router

    def _stub(self, router: int) -> Any:
        address = self._connection.addresses[router]
        if address not in self._channels:
            self._channels[address] = self._connection.open_aio(address)
        return InferenceServiceStub(self._channels[address])

    async def _unary(self, timeout: float | None, invoke: Callable[..., Awaitable[T]]) -> T:
        return await self._unary_counted(timeout, lambda stub, count, **call: invoke(stub, **call))

    async def _unary_counted(self, timeout: float | None, invoke: Callable[..., Awaitable[T]]) -> T:
        """`invoke(stub, tries that failed so far, **call)` until one succeeds."""
        attempts = self._attempts(timeout)
        while True:
            remaining = attempts.remaining(time.monotonic())
            router = attempts.router
            try:
                result = await invoke(
                    self._stub(router), attempts.count, timeout=remaining, metadata=self._connection.metadata
                )
            except grpc.RpcError as rpc_error:
                error = decode(rpc_error)
            else:
                self._prefer(router)
                return result
            await asyncio.sleep(attempts.failed(error, time.monotonic(), may_repeat=error.retryable))
