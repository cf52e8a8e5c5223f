"""Well-behaved peers of a real hub, whose requests must end with the right tokens whatever their neighbours send."""

from __future__ import annotations

import functools
from random import Random
from typing import Any

import numpy as np
from octavo.v1 import common_pb2, scheduler_pb2

from router import batch
from scheduler.hub import Hub
from service.columns import pack
from worker.backend import Backend, BackendError, BackendInfo
from worker.backends.mock import EOS_TOKEN_ID, MockBackend, MockSettings
from worker.backends.mock_assets import mock_assets
from worker.offline import OfflineEngine, OfflineRequest
from worker.session import Execute, Identity, Leave, WorkerSession
from worker.step import SamplingParams

VOCAB, MAX_MODEL_LEN = 320, 64
SETTINGS = MockSettings(
    vocab_size=VOCAB, max_model_len=MAX_MODEL_LEN, max_rows=4, max_num_batched_tokens=24, block_size=4, num_blocks=48,
    eos_every=20,
)  # fmt: skip
MODEL, DIGEST = "good", b"g" * 32


def hello_of(info: BackendInfo, model: str, digest: bytes, incarnation: int) -> scheduler_pb2.WorkerHello:
    """What a worker says of itself."""
    group = info.kv_groups[0]
    return scheduler_pb2.WorkerHello(
        incarnation=incarnation, protocol=1, model=model, model_digest=digest, tokenizer_digest=digest,
        numerics_digest=digest, hash_version=1, vocab_size=info.vocab_size, max_model_len=info.max_model_len,
        max_rows=info.max_rows, max_num_batched_tokens=info.max_num_batched_tokens, name=model, backend="mock",
        kv_dtype="uint64", capabilities=["x", "grammar"], address="127.0.0.1:1",
        kv_groups=[
            scheduler_pb2.KvGroup(
                id=0, block_size=group.block_size, num_blocks=group.num_blocks, bytes_per_block=group.bytes_per_block
            )
        ],
        group=scheduler_pb2.ParallelGroup(tensor_parallel=1, pipeline_parallel=1, ranks=1),
    )  # fmt: skip


def run_step(backend: Backend, action: Execute) -> Any:
    """One step as the engine runs it."""
    backend.begin(action.step)
    backend.forward(action.step)
    backend.sample(action.step)
    return backend.collect()


class GoodWorker:
    """The real session and the mock device. Whatever the hub sends must be right: nothing here is caught."""

    def __init__(self, hub: Hub, now: float) -> None:
        self._hub = hub
        self._backend = MockBackend(SETTINGS)
        info = self._backend.load(lambda what, done, total: None)
        hello = hello_of(info, MODEL, DIGEST, incarnation=0x7123456789ABCDEF)
        self.session = WorkerSession(Identity(hello, info, mock_assets(VOCAB, MAX_MODEL_LEN)))
        self.peer = hub.enlist(self.session.connected(now).hello, now)

    def pump(self, now: float) -> None:
        """Answer all that waits."""
        for beat in self.session.tick(now):
            assert not isinstance(beat, Execute | Leave), beat
            self._hub.on_worker(self.peer, beat, now)
        while (message := self.peer.take(now)) is not None:
            for action in self.session.on_message(message, now):
                if isinstance(action, Execute):
                    output = run_step(self._backend, action)
                    answer = self.session.on_output(action.epoch, output, now)
                    assert answer is not None
                    self._hub.on_worker(self.peer, answer, now)
                else:
                    assert not isinstance(action, Leave), action
                    self._hub.on_worker(self.peer, action, now)
        assert self.peer.cut is None, self.peer.cut


class GoodRouter:
    """Submits, and takes tokens exactly once."""

    def __init__(self, hub: Hub, now: float) -> None:
        self._hub = hub
        self.peer = hub.attach(scheduler_pb2.RouterHello(incarnation=77, protocol=1, name="good"), now)
        self._expected: dict[int, tuple[int, ...]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._unfinished: set[int] = set()

    @property
    def done(self) -> bool:
        """All requests have ended."""
        return not self._unfinished

    def submit(self, random: Random, now: float) -> None:
        """One more request."""
        handle, kind = len(self._tokens) + 1, random.randrange(12)
        prompt, max_tokens = request(kind)
        self._expected[handle], self._tokens[handle] = expected(kind), []
        self._unfinished.add(handle)
        stops = pack([EOS_TOKEN_ID], np.int32)
        submit = scheduler_pb2.Submit(
            handle=handle, task=scheduler_pb2.TASK_GENERATE, model=MODEL, digest=DIGEST, seed=kind, tenant="good",
            prompt=[scheduler_pb2.Segment(token_ids=pack(prompt, np.int32))], num_prompt_tokens=len(prompt),
            sampling=common_pb2.SamplingSpec(
                temperature=1, top_p=1, repetition_penalty=1, max_tokens=max_tokens, stop_token_ids=stops
            ),
        )  # fmt: skip
        self._hub.on_router(self.peer, scheduler_pb2.AttachRequest(epoch=self.peer.epoch, submit=submit), now)

    def pump(self, now: float) -> None:
        """Take all that waits."""
        beat = scheduler_pb2.RouterHeartbeat()
        self._hub.on_router(self.peer, scheduler_pb2.AttachRequest(epoch=self.peer.epoch, heartbeat=beat), now)
        while (message := self.peer.take(now)) is not None:
            assert not message.HasField("failed"), message
            if message.HasField("tokens"):
                for entry in batch.parse(message.tokens):
                    got = self._tokens[entry.handle]
                    assert entry.first_output_index == len(got)
                    got += entry.token_ids
                    if entry.finish_reason:
                        self._unfinished.remove(entry.handle)
                        assert tuple(got) == self._expected[entry.handle], entry
        assert self.peer.cut is None, self.peer.cut


def request(kind: int) -> tuple[list[int], int]:
    """Prompt and max_tokens of one of a few requests."""
    random = Random(kind)
    return [random.randrange(VOCAB) for _ in range(random.randrange(1, 30))], random.randrange(1, 12)


@functools.cache
def expected(kind: int) -> tuple[int, ...]:
    """Its tokens, undisturbed."""
    prompt, max_tokens = request(kind)
    sampling = SamplingParams(temperature=1.0, stop_token_ids=(EOS_TOKEN_ID,))
    engine = OfflineEngine(MockBackend(SETTINGS))
    return tuple(engine.generate([OfflineRequest(prompt, max_tokens, sampling, seed=kind)])[0].token_ids)


__all__ = ["BackendError", "GoodRouter", "GoodWorker", "expected", "hello_of", "request", "run_step"]
