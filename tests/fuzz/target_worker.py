"""A worker's session and its device under a hostile scheduler: nothing out of range may reach a backend."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from octavo.v1 import scheduler_pb2
from safetensors.torch import save_file

from scheduler.hub import Hub, HubSettings
from service.errors import OctavoError, Reason
from tests.fuzz import messages
from tests.fuzz.harness import EPISODE, Target, Verdict
from tests.fuzz.ledger import Ledger
from tests.fuzz.peers import DIGEST, MODEL, SETTINGS, VOCAB, hello_of, run_step
from tests.fuzz.plans import edge_plan
from tests.fuzz.submits import submit
from worker.backend import Backend, BackendError, BackendInfo
from worker.backends.mock import MockBackend
from worker.backends.torch_backend import TorchBackend, TorchSettings
from worker.checkpoint.config import parse_config
from worker.checkpoint.weights import expected_tensors
from worker.session import Execute, Identity, Leave, WorkerSession


class _World:
    """A hub that plans real work for the worker; what it sends is mutated on the way."""

    def __init__(self, random: Random, backend: Backend, info: BackendInfo) -> None:
        self.random = random
        self.now = 1000.0
        self.backend, self.info = backend, info
        self.hub = Hub(
            HubSettings(run_ahead=random.randint(1, 3), max_run_ahead=random.randint(1, 4)), 9, random.getrandbits(60)
        )
        self.hub.tick(self.now)
        self.router = self.hub.attach(scheduler_pb2.RouterHello(incarnation=1, protocol=1), self.now)
        self.handles = 0
        hello = hello_of(info, MODEL, DIGEST, 3)
        self.session = WorkerSession(Identity(hello, info, {"config.json": b"{}", "empty": b""}))
        self.ledger = Ledger(info)
        self.waiting: deque[scheduler_pb2.EnlistResponse] = deque()
        self._enlist()

    def _enlist(self) -> None:
        self.backend.reset()
        self.ledger.reset()
        self.waiting.clear()
        self.peer = self.hub.enlist(self.session.connected(self.now).hello, self.now)

    def _left(self) -> None:
        """The stream is over: as worker/enlist.py and scheduler/service.py do."""
        self.session.disconnected()
        self.hub.worker_gone(self.peer, self.now)
        self._enlist()

    def attack(self) -> Verdict:
        message, mutated = self._next()
        if message is None:
            self._left()
            return Verdict(mutated, False)
        try:
            for action in self.session.on_message(message, self.now):
                if isinstance(action, Leave):
                    self._left()
                    return Verdict(mutated, True)
                answer: Any = self._execute(action) if isinstance(action, Execute) else action
                if answer is not None:
                    self._answer(answer)
        except OctavoError:
            self._left()
            return Verdict(mutated, False)
        for action in self.session.tick(self.now):
            if isinstance(action, Leave):
                self._left()
                break
        return Verdict(mutated, True)

    def _next(self) -> tuple[scheduler_pb2.EnlistResponse | None, bool]:
        random = self.random
        self.now += 0.01
        while not self.waiting:
            self._make_work()
        message = self.waiting.popleft()
        kind = random.random()
        # Before the welcome nothing else gets through, so that one is mostly left as it is.
        if kind < (0.8 if message.HasField("welcome") else 0.3):
            return message, True
        if kind < 0.8:
            return messages.mutated(random, message), True
        if kind < 0.92 and message.HasField("plan"):
            message.plan.CopyFrom(edge_plan(random, self.info, message.epoch, message.plan.step_id))
            return message, False
        made = messages.invented(random, scheduler_pb2.EnlistResponse)
        if made is not None and random.random() < 0.8:
            made.epoch = self.session.epoch
            if made.HasField("plan"):
                made.plan.epoch = made.epoch
        return made, False

    def _make_work(self) -> None:
        for _ in range(self.random.randrange(3)):
            self.handles += 1
            made = submit(self.random, self.handles, MODEL, DIGEST, self.info.vocab_size)
            self.hub.on_router(self.router, scheduler_pb2.AttachRequest(epoch=self.router.epoch, submit=made), self.now)
        if self.random.random() < 0.1:
            cancel = scheduler_pb2.Cancel(handle=self.random.randint(1, self.handles + 1))
            message = scheduler_pb2.AttachRequest(epoch=self.router.epoch, cancel=cancel)
            self.hub.on_router(self.router, message, self.now)
        if self.peer.cut is not None or self.peer.closing:
            self._left()
        self.hub.plan(self.now)
        while (message := self.peer.take(self.now)) is not None:
            self.waiting.append(message)
        while self.router.take(self.now) is not None:
            pass
        if self.random.random() < 0.2:
            beat = scheduler_pb2.EnlistResponse(epoch=self.peer.epoch)
            kind = self.random.choice(("heartbeat", "heartbeat", "send_assets", "redial", "go_away"))
            getattr(beat, kind).SetInParent()
            self.waiting.append(beat)

    def _execute(self, action: Execute) -> Any:
        self.ledger.check(action.step)
        try:
            output = run_step(self.backend, action)
        except BackendError as error:  # a lie about what the cache holds: the step fails, its epoch ends
            failed = list(self.session.on_step_failed(action.epoch, action.step.step_id, str(error)))
            assert isinstance(failed[-1], Leave)
            raise OctavoError(Reason.INTERNAL, "left") from None
        return self.session.on_output(action.epoch, output, self.now)

    def _answer(self, message: scheduler_pb2.EnlistRequest) -> None:
        try:
            self.hub.on_worker(self.peer, message, self.now)
        except OctavoError:  # the hub finds that this does not answer what it has planned
            self._left()


def _episodes(make: Any) -> Any:
    def episode(random: Random) -> Iterator[Verdict]:
        backend, info = make()
        world = _World(random, backend, info)
        for _ in range(EPISODE):
            yield world.attack()

    return episode


def _mock() -> tuple[Backend, BackendInfo]:
    backend = MockBackend(SETTINGS)
    return backend, backend.load(lambda what, done, total: None)


@functools.cache
def _torch() -> tuple[Backend, BackendInfo]:
    """A model of random weights, loaded once; the caller resets it."""
    values = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "torch_dtype": "float32", "tie_word_embeddings": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes = expected_tensors(parse_config(folder / "config.json", values))
        generator = torch.Generator().manual_seed(5)
        save_file(
            {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(values))
        settings = TorchSettings(max_rows=4, max_num_batched_tokens=24, block_size=4, num_blocks=48, threads=1)
        backend = TorchBackend(folder, settings)
        return backend, backend.load(lambda what, done, total: None)


_MODULES = ("worker.session", "worker.plan_codec", "service.columns", "service.sampling")
TARGET = Target("worker", _episodes(_mock), (*_MODULES, "worker.backends.mock"))
TORCH_TARGET = Target(
    "worker-torch",
    _episodes(_torch),
    (*_MODULES, "worker.backends.torch_rows", "worker.sampling.processors"),
    inputs=500,
)
