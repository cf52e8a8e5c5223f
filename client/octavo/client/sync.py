"""The client for threads. One `Client` may be shared by many threads, a `Stream` belongs to one."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc
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
from octavo.v1 import inference_pb2 as pb
from octavo.v1.inference_pb2_grpc import InferenceServiceStub

T = TypeVar("T")
# For calls that only look something up, in seconds.
LOOKUP_TIMEOUT = 30.0


class Stream:
    """The events of one generation: Started, then Deltas and one Finished for each output.

    It resumes by itself when it breaks. Closing it, or leaving its `with` block, cancels the request.
    """

    def __init__(self, client: Client, request: pb.GenerateRequest, timeout: float | None) -> None:
        self._client = client
        self._attempts = client._attempts(timeout)
        self._session = GenerateSession(request, self._attempts)
        self._call: Any = None
        self._reading = False
        self._fell_silent = False  # the present call was cancelled because its router said nothing
        # Set once; also wakes a wait between two tries.
        self._closed = threading.Event()

    @property
    def started(self) -> pb.Started | None:
        """The first message, with request id and seed, once it has come."""
        return self._session.started

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        """The next event. Raises OctavoError."""
        while not self._closed.is_set():
            error = None
            try:
                response = self._read()
            except grpc.RpcError as rpc_error:
                response, error = None, decode(rpc_error)
            if self._fell_silent:
                response, error = None, self._session.fell_silent()
            if response is None:
                self._after_break(error)
                continue
            event = self._receive(response)
            if event is not None:
                return event
        raise StopIteration

    def text(self) -> Iterator[str]:
        """Pieces of the text of output 0, as they come."""
        for event in self:
            if isinstance(event, pb.Delta) and event.index == 0 and event.text:
                yield event.text

    def result(self) -> pb.CompleteResponse:
        """Reads to the end and returns the whole answer. Raises OctavoError."""
        collector = Collector()
        for event in self:
            collector.add(event)
        return collector.response()

    def close(self) -> None:
        """Cancel what still runs. May be called from any thread; the iteration then ends."""
        self._closed.set()
        self._client._watcher.discard(self)
        call = self._call
        if call is not None:
            call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> pb.GenerateResponse | None:
        if self._call is None:
            remaining = self._attempts.remaining(time.monotonic())
            stub = self._client._stub(self._attempts.router)
            self._call = stub.Generate(
                self._session.next_request(), timeout=remaining, metadata=self._client._connection.metadata
            )
            if self._closed.is_set():  # close() came between and found no call to cancel
                self._call.cancel()
            self._fell_silent = False
            if self._session.silence is not None:
                self._session.silence.dialled(time.monotonic())
                self._client._watcher.add(self)
        if self._session.silence is not None:
            self._session.silence.listening(time.monotonic())
        self._reading = True
        try:
            return cast("pb.GenerateResponse | None", next(self._call, None))
        finally:
            self._reading = False

    def _judge(self, now: float) -> None:
        """From the watcher's thread: cancel a call whose router has said nothing for too long."""
        silence, call = self._session.silence, self._call
        if silence is not None and self._reading and call is not None and silence.over(now):
            self._fell_silent = True
            call.cancel()

    def _receive(self, response: pb.GenerateResponse) -> Event | None:
        try:
            return self._session.receive(response)
        except OctavoError:
            self.close()
            raise

    def _after_break(self, error: OctavoError | None) -> None:
        self._call = None
        self._client._watcher.discard(self)
        if self._session.complete or self._closed.is_set():
            self._closed.set()
            self._client._prefer(self._attempts.router)
            return
        try:
            delay = self._session.broke(error, time.monotonic())
        except OctavoError:
            self._closed.set()
            raise
        self._closed.wait(delay)


class _Watcher:
    """A thread that judges the silence of the streams that are being read; it runs while there are any."""

    _PERIOD = 0.05

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()  # an abandoned stream must not be kept alive
        self._running = False

    def add(self, stream: Stream) -> None:
        with self._lock:
            self._streams.add(stream)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="octavo-silence", daemon=True).start()

    def discard(self, stream: Stream) -> None:
        with self._lock:
            self._streams.discard(stream)

    def _run(self) -> None:
        while self._judge_all():
            time.sleep(self._PERIOD)  # holding no stream

    def _judge_all(self) -> bool:
        with self._lock:
            streams = list(self._streams)
            self._running = bool(streams)
        now = time.monotonic()
        for stream in streams:
            stream._judge(now)
        return bool(streams)


class Client:
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
        self._lock = threading.Lock()  # guards _channels
        self._channels: dict[str, grpc.Channel] = {}
        self._preferred = 0  # router that answered last; a hint, so without the lock
        self._watcher = _Watcher()

    def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Stream:
        """Continue a text, or token ids. `timeout` in seconds bounds the whole generation, resumes included."""
        return Stream(self, prompt_request(prompt, options), timeout)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Answer a conversation, rendered by the model's chat template."""
        return Stream(self, chat_request(messages, options, tools=tools), timeout)

    def stream(self, request: pb.GenerateRequest, *, timeout: float | None = None) -> Stream:
        """Any request of the contracts. It is copied."""
        copy = pb.GenerateRequest()
        copy.CopyFrom(request)
        return Stream(self, copy, timeout)

    def complete(
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
            with self.stream(request.request, timeout=timeout) as stream:
                return stream.result()
        base = request.request.attempt

        def invoke(stub: InferenceServiceStub, count: int, **call: Any) -> pb.CompleteResponse:
            request.request.attempt = base + count  # so that a key that ran for an answer that was lost runs again
            return stub.Complete(request, **call)

        return self._call_counted(timeout, invoke)

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        model: str = "",
        add_special_tokens: bool | None = None,
    ) -> pb.TokenizeResponse:
        """Token ids of a text or of messages, exactly as generating would see them."""
        request = tokenize_request(text, messages, model, add_special_tokens)
        response: pb.TokenizeResponse = self._call(LOOKUP_TIMEOUT, lambda stub, **call: stub.Tokenize(request, **call))
        return response

    def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool | None = None) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        response: pb.DetokenizeResponse = self._call(
            LOOKUP_TIMEOUT, lambda stub, **call: stub.Detokenize(request, **call)
        )
        return response.text

    def list_models(self) -> list[pb.Model]:
        """The models that can be asked for now."""
        response: pb.ListModelsResponse = self._call(
            LOOKUP_TIMEOUT, lambda stub, **call: stub.ListModels(pb.ListModelsRequest(), **call)
        )
        return list(response.models)

    def get_model_assets(self, model: str = "") -> dict[str, bytes]:
        """Tokenizer, template and configuration of a model: file name to content."""
        request = pb.GetModelAssetsRequest(model=model)
        return self._call(
            LOOKUP_TIMEOUT, lambda stub, **call: assemble(item.chunk for item in stub.GetModelAssets(request, **call))
        )

    def close(self) -> None:
        """Close the connections; what still runs is cancelled."""
        with self._lock:
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attempts(self, timeout: float | None) -> Attempts:
        deadline = None if timeout is None else time.monotonic() + timeout
        return Attempts(self._retry, len(self._connection.addresses), first=self._preferred, deadline=deadline)

    def _prefer(self, router: int) -> None:
        self._preferred = router

    def _stub(self, router: int) -> InferenceServiceStub:
        address = self._connection.addresses[router]
        with self._lock:
            if address not in self._channels:
                self._channels[address] = self._connection.open_sync(address)
            return InferenceServiceStub(self._channels[address])

    def _call(self, timeout: float | None, invoke: Callable[..., T]) -> T:
        return self._call_counted(timeout, lambda stub, count, **call: invoke(stub, **call))

    def _call_counted(self, timeout: float | None, invoke: Callable[..., T]) -> T:
        """`invoke(stub, tries that failed so far, **call)` until one succeeds."""
        attempts = self._attempts(timeout)
        while True:
            remaining = attempts.remaining(time.monotonic())
            router = attempts.router
            try:
                result = invoke(
                    self._stub(router), attempts.count, timeout=remaining, metadata=self._connection.metadata
                )
            except grpc.RpcError as rpc_error:
                error = decode(rpc_error)
            else:
                self._prefer(router)
                return result
            time.sleep(attempts.failed(error, time.monotonic(), may_repeat=error.retryable))
