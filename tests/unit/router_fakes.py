"""Stand-ins for the router's neighbours: small tokenizers made in code and a scheduler that follows a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from octavo.v1 import common_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from router.assets import AssetStore, ModelAssets
from router.attach import Attachments
from router.gate import Gate
from router.grammar import GrammarChecker
from router.hub import Hub
from router.inference import Inference
from router.prepare import Clocks, Preparation, TextPool
from router.service import InferenceService
from router.session import RouterSession, SessionSettings
from router.stats import Stats
from router.ticket import TicketOffice
from service.columns import pack
from service.decoding import DecodeInterceptor
from service.keys import Authenticator
from tests.unit.waiting import eventually

DIGEST = bytes(range(32))
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = ["hello world, the quick brown fox", "naïve café 你好世界 😀😃", "stop here and there, hello hello world"]


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE with a BOS that the post-processor adds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: text pieces with U+2581 for spaces, and 256 byte tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", "▁hello", "▁world", "h", "e", "l", "o", "你", "é", "▁▁", "a", "▁a", "."]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def asset_files(tokenizer: Tokenizer | None = None, **more: bytes) -> dict[str, bytes]:
    """The files of a model; `more` adds or replaces (dots written as __)."""
    tokenizer = tokenizer or byte_level_tokenizer()
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(
            {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
        ).encode(),
        "generation_config.json": json.dumps({"eos_token_id": tokenizer.token_to_id("</s>")}).encode(),
        "config.json": b"{}",
    }
    return files | {name.replace("__", "."): data for name, data in more.items()}


def assets(tokenizer: Tokenizer | None = None, **more: bytes) -> ModelAssets:
    """Loaded."""
    return ModelAssets.load(asset_files(tokenizer, **more))


def served(name: str = "tiny", digest: bytes = DIGEST, workers: int = 1) -> scheduler_pb2.ServedModel:
    """A model that enlisted workers hold."""
    return scheduler_pb2.ServedModel(name=name, digest=digest, max_model_len=512, vocab_size=340, workers=workers)


def welcome(epoch: int = 1, *models: scheduler_pb2.ServedModel) -> scheduler_pb2.AttachResponse:
    """The answer to Hello."""
    return scheduler_pb2.AttachResponse(
        epoch=epoch,
        welcome=scheduler_pb2.RouterWelcome(
            incarnation=7, protocol=1, heartbeat_ms=100, lease_ms=300, models=models or (served(),)
        ),
    )


Entry = tuple[int, int, Sequence[int], int]


def tokens(epoch: int, *entries: Entry) -> scheduler_pb2.AttachResponse:
    """A TokenBatch of (handle, first_output_index, token_ids, finish_reason)."""
    batch = scheduler_pb2.TokenBatch(
        handles=pack([e[0] for e in entries], np.uint32),
        first_output_index=pack([e[1] for e in entries], np.int32),
        num_tokens=pack([len(e[2]) for e in entries], np.int32),
        finish_reason=pack([e[3] for e in entries], np.uint8),
        token_ids=pack([i for e in entries for i in e[2]], np.int32),
    )
    return scheduler_pb2.AttachResponse(epoch=epoch, tokens=batch)


Say = Callable[[scheduler_pb2.AttachResponse], Awaitable[None]]
Script = Callable[[scheduler_pb2.AttachRequest, Say], Awaitable[None]]


class FakeScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """A real gRPC server. It welcomes each router; everything else is the script's, called for each message but Hello."""

    def __init__(self, script: Script, files: dict[str, bytes] | None = None) -> None:
        self.script = script
        self.files = files or asset_files()
        self.models: list[scheduler_pb2.ServedModel] = [served()]
        self.received: list[scheduler_pb2.AttachRequest] = []
        self.lets_go: Callable[[scheduler_pb2.AttachRequest], bool] = lambda message: message.HasField("detach")
        self.epoch = 0
        self.address = ""
        self.server: grpc.aio.Server | None = None
        self._calls: set[asyncio.Task[Any]] = set()

    async def start(self, port: int = 0) -> str:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()
        return self.address

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.stop(0)

    def submits(self) -> list[scheduler_pb2.Submit]:
        return [m.submit for m in self.received if m.HasField("submit")]

    def cancels(self) -> list[scheduler_pb2.Cancel]:
        return [m.cancel for m in self.received if m.HasField("cancel")]

    def break_streams(self) -> None:
        """Every attached router's stream ends, as if the process had died."""
        for call in list(self._calls):
            call.cancel()

    async def Attach(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        inner = asyncio.create_task(self._serve(request_iterator, context))
        self._calls.add(inner)
        try:
            await asyncio.wait([inner])
        finally:
            self._calls.discard(inner)
            inner.cancel()
        if not inner.cancelled() and inner.exception() is None and inner.result():
            return
        await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")

    async def _serve(self, request_iterator: Any, context: Any) -> bool:
        """Whether the stream has ended in peace."""
        self.epoch += 1
        epoch = self.epoch

        lock = asyncio.Lock()  # gRPC takes one write at a time

        async def say(message: scheduler_pb2.AttachResponse) -> None:
            message.epoch = message.epoch or epoch
            async with lock:
                await context.write(message)

        beat: asyncio.Task[None] | None = None
        try:
            async for message in request_iterator:
                if message.HasField("hello"):
                    await say(welcome(epoch, *self.models))
                    beat = asyncio.create_task(_beat(say))
                    continue
                self.received.append(message)
                if message.HasField("cancel"):
                    cancelled = scheduler_pb2.Cancelled(handle=message.cancel.handle)
                    await say(scheduler_pb2.AttachResponse(cancelled=cancelled))
                await self.script(message, say)
                if self.lets_go(message):
                    return True
        finally:
            if beat is not None:
                beat.cancel()
        return False

    async def FetchAssets(self, request: Any, context: Any) -> None:  # type: ignore[override]
        for name, data in self.files.items():
            chunk = common_pb2.AssetChunk(name=name, size=len(data), data=data)
            await context.write(scheduler_pb2.FetchAssetsResponse(chunk=chunk))


async def _beat(say: Say) -> None:
    while True:
        await asyncio.sleep(0.1)
        await say(scheduler_pb2.AttachResponse(load=scheduler_pb2.Load()))


class RouterUnderTest:
    """A whole router in this process, without its settings and lifecycle."""

    def __init__(
        self, schedulers: Sequence[str], secret: bytes = b"secret", max_requests: int = 1000, **hub_options: Any
    ) -> None:
        self.session = RouterSession(SessionSettings(incarnation=5, name="test", patience=5.0, linger=0.2))
        self.hub = Hub(self.session, on_models=self._on_models, **hub_options)
        self.pool = TextPool()
        self.attachments = Attachments(self.hub, grpc.aio.insecure_channel)
        self.store = AssetStore(self.attachments.fetch_assets, self.pool.executor)
        self.grammars = GrammarChecker()
        self.preparation = Preparation(
            self.session.models,
            self.store,
            self.pool,
            self.grammars,
            TicketOffice(secret),
            Clocks(self.hub.now, lambda: 1_750_000_000.0),
        )
        stats = Stats(CollectorRegistry(), self.session)
        self.gate = Gate(max_requests)
        self.inference = Inference(self.hub, self.store, self.preparation, self.pool, stats, self.gate)
        self.service = InferenceService(self.inference, Authenticator())
        self._schedulers = schedulers
        self.stub: Any = None

    def _on_models(self) -> None:
        self.store.want(self.session.models.digests())

    async def __aenter__(self) -> RouterUnderTest:
        self.clock = asyncio.create_task(self.hub.run_clock(0.03))
        self.server = grpc.aio.server(interceptors=[DecodeInterceptor()], options=[("grpc.so_reuseport", 0)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.service, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.attachments.set_addresses(self._schedulers)
        await eventually(lambda: self.session.num_attached == len(self._schedulers))
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.channel.close()
        await self.server.stop(0)
        await self.attachments.close()
        self.clock.cancel()
        await self.store.close()
        await self.grammars.close()
        self.pool.close()


@asynccontextmanager
async def cluster(
    script: Script, files: dict[str, bytes] | None = None, **options: Any
) -> AsyncIterator[tuple[FakeScheduler, RouterUnderTest]]:
    """One scheduler with a script and one router attached to it. `files`: the model's."""
    scheduler = FakeScheduler(script, files)
    await scheduler.start()
    try:
        async with RouterUnderTest([scheduler.address], **options) as router:
            yield scheduler, router
    finally:
        await scheduler.stop()
