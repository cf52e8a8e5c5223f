"""A scheduler between hostile peers and good ones: the streams Attach and Enlist of a real hub."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
from octavo.v1 import common_pb2, scheduler_pb2, step_pb2

from router import batch
from scheduler.hub import Hub, HubSettings
from scheduler.inspect import inspect, list_workers
from scheduler.peers import RouterPeer, WorkerPeer
from service.columns import pack, unpack
from service.errors import OctavoError
from tests.fuzz import messages
from tests.fuzz.harness import EPISODE, Target, Verdict
from tests.fuzz.ledger import Ledger
from tests.fuzz.peers import DIGEST, MODEL, SETTINGS, VOCAB, GoodRouter, GoodWorker, hello_of
from tests.fuzz.submits import submit
from worker.backend import BackendInfo, KVGroup
from worker.backends.mock import MockBackend
from worker.plan_codec import RowBooks

_EVIL, _EVIL_DIGEST = "evil", b"e" * 32
_INFO = MockBackend(SETTINGS).load(lambda what, done, total: None)
_CHECK_EVERY = 5


class _World:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 1000.0
        self.hub = Hub(
            HubSettings(run_ahead=random.randint(1, 3), max_run_ahead=random.randint(1, 4)),
            incarnation=9,
            first_epoch=random.getrandbits(60),
        )
        self.hub.tick(self.now)
        self.worker = GoodWorker(self.hub, self.now)
        self.worker.pump(self.now)
        self.router = GoodRouter(self.hub, self.now)
        self.evil_router: RouterPeer | None = None
        self.evil_worker: WorkerPeer | None = None
        self.plans: deque[step_pb2.StepPlan] = deque()
        self.valid: deque[scheduler_pb2.EnlistRequest] = deque()
        self.handles = 0

    # ---- one hostile message

    def attack(self) -> Verdict:
        if self.random.random() < 0.5:
            return self._attack_as_router()
        return self._attack_as_worker()

    def _attack_as_router(self) -> Verdict:
        router = self.evil_router
        if router is None:
            hello = scheduler_pb2.RouterHello(incarnation=5, protocol=1, name="evil", capabilities=["a"])
            message, mutated = self._maybe(hello, valid=0.7)
            if message is not None:
                try:
                    self.evil_router = self.hub.attach(message, self.now)
                except OctavoError:
                    message = None
            return Verdict(mutated, message is not None)
        message, mutated = self._maybe(self._from_router(router))
        try:
            if message is not None:
                self.hub.on_router(router, message, self.now)
                return Verdict(mutated, True)
        except OctavoError:
            pass
        self._lose_router()
        return Verdict(mutated, False)

    def _from_router(self, router: RouterPeer) -> scheduler_pb2.AttachRequest:
        message = scheduler_pb2.AttachRequest(epoch=router.epoch)
        kind = self.random.random()
        if kind < 0.8:
            self.handles += 1
            model, digest = self.random.choice(((MODEL, DIGEST), (_EVIL, _EVIL_DIGEST), (_EVIL, _EVIL_DIGEST)))
            message.submit.CopyFrom(submit(self.random, self.handles, model, digest, VOCAB))
        elif kind < 0.95:
            message.cancel.handle = self.random.randint(1, self.handles + 1)
        elif kind < 0.99:
            message.heartbeat.SetInParent()
        else:
            message.detach.SetInParent()
        return message

    def _attack_as_worker(self) -> Verdict:
        worker = self.evil_worker
        if worker is None:
            hello = hello_of(_INFO, _EVIL, _EVIL_DIGEST, self.random.choice((1, 2, 3)))
            message, mutated = self._maybe(hello, valid=0.6)
            if message is not None:
                try:
                    self._enlisted(self.hub.enlist(message, self.now))
                except OctavoError:
                    message = None
            return Verdict(mutated, message is not None)
        if not self.valid:
            self._ask(worker)
        message, mutated = self._maybe(self.valid.popleft())
        try:
            if message is not None:
                self.hub.on_worker(worker, message, self.now)
                return Verdict(mutated, True)
        except OctavoError:
            pass
        self._lose_worker()
        return Verdict(mutated, False)

    def _enlisted(self, worker: WorkerPeer) -> None:
        hello = worker.hello
        group = hello.kv_groups[0]
        info = BackendInfo(
            "mock", "", "", hello.vocab_size, hello.max_model_len, hello.max_rows, hello.max_num_batched_tokens,
            (KVGroup(0, group.block_size, group.num_blocks, 1, None),),
        )  # fmt: skip
        # Nobody gets a grammar who did not claim to take it.
        books = RowBooks(info, grammars="grammar" in hello.capabilities)
        self.evil_worker, self.books, self.ledger = worker, books, Ledger(info)
        self.plans.clear()
        self.valid.clear()

    def _ask(self, worker: WorkerPeer) -> None:
        """What a worker would say now."""
        say = scheduler_pb2.EnlistRequest(epoch=worker.epoch)
        if worker.incoming is not None and self.random.random() < 0.7:
            for name in ("config.json", "tokenizer.json"):
                chunk = common_pb2.AssetChunk(name=name, size=2, data=b"{}")
                self.valid.append(scheduler_pb2.EnlistRequest(epoch=worker.epoch, asset=chunk))
            say.assets_end.digest = worker.hello.model_digest
        elif self.plans:
            say.result.CopyFrom(self._answer(worker, self.plans.popleft()))
        elif self.random.random() < 0.97:
            say.heartbeat.last_step = worker.last_step
        else:
            say.draining.SetInParent()
        self.valid.append(say)

    def _answer(self, worker: WorkerPeer, plan: step_pb2.StepPlan) -> step_pb2.StepResult:
        random, vocab = self.random, worker.hello.vocab_size
        samples = np.flatnonzero(unpack("", plan.num_samples, np.uint8)).tolist()
        result = step_pb2.StepResult(
            epoch=worker.epoch, step_id=plan.step_id, status=step_pb2.STEP_STATUS_OK, num_tokens=bytes([1] * len(samples)),
            token_ids=pack([random.randrange(vocab) for _ in samples], np.int32), device_ns=1000, gap_ns=10,
        )  # fmt: skip
        if random.random() < 0.1:
            return step_pb2.StepResult(
                epoch=worker.epoch, step_id=plan.step_id, status=step_pb2.STEP_STATUS_FAILED, message="on purpose"
            )
        if random.random() < 0.1 and samples:
            result.row_status = bytes([1] + [0] * (len(samples) - 1))
            result.num_tokens = bytes([0] + [1] * (len(samples) - 1))
            result.token_ids = result.token_ids[4:]
        if random.random() < 0.6 and samples:
            sizes = [random.randint(1, 4) for _ in samples]
            result.logprobs.CopyFrom(
                common_pb2.LogprobColumns(
                    owner=pack(samples, np.int32), position=pack([random.randrange(64) for _ in samples], np.int32),
                    rank=pack([1] * len(samples), np.int32), num_entries=pack(sizes, np.int32),
                    token_ids=pack([random.randrange(vocab) for _ in range(sum(sizes))], np.int32),
                    logprobs=pack([-random.random() for _ in range(sum(sizes))], np.float32),
                )
            )  # fmt: skip
        return result

    def _maybe(self, message: Any, valid: float = 0.25) -> tuple[Any, bool]:
        """The message as it is, mutated, or another one; and whether it comes from a valid one."""
        kind = self.random.random()
        if kind < valid:
            return message, True
        if kind < 0.9:
            return messages.mutated(self.random, message), True
        return messages.invented(self.random, type(message)), False

    # ---- what everyone else does meanwhile

    def settle(self, number: int) -> None:
        self.now += 0.02
        if self.random.random() < 0.15:
            self.router.submit(self.random, self.now)
        self.hub.tick(self.now)
        self.hub.plan(self.now)
        self.worker.pump(self.now)
        self.router.pump(self.now)
        self._read_as_router()
        self._read_as_worker()
        if number % _CHECK_EVERY == 0:
            self.hub.core.check_integrity()
            inspect(self.hub, scheduler_pb2.InspectRequest(rows=True), 1).SerializeToString()
            list_workers(self.hub)

    def _read_as_router(self) -> None:
        """What a hub sends, a router takes."""
        router = self.evil_router
        if router is None:
            return
        while (message := router.take(self.now)) is not None:
            message.SerializeToString()
            if message.HasField("tokens"):
                batch.parse(message.tokens)
        if router.cut is not None or router.closing:
            self._lose_router()

    def _read_as_worker(self) -> None:
        """What a hub sends, a worker takes: it is within what its Hello said."""
        worker = self.evil_worker
        if worker is None:
            return
        while (message := worker.take(self.now)) is not None:
            message.SerializeToString()
            if message.HasField("plan"):
                self.ledger.check(self.books.decode(message.plan))
                self.plans.append(message.plan)
        if worker.cut is not None or worker.closing:
            self._lose_worker()

    def _lose_router(self) -> None:
        if self.evil_router is not None:
            self.hub.router_gone(self.evil_router, self.now)
            self.evil_router = None

    def _lose_worker(self) -> None:
        if self.evil_worker is not None:
            self.hub.worker_gone(self.evil_worker, self.now)
            self.evil_worker = None

    def finish(self) -> None:
        """The hostile ones leave; the good ones get what they wanted."""
        self._lose_router()
        self._lose_worker()
        for _ in range(300):
            if self.router.done:
                break
            self.settle(1)
        assert self.router.done, "a good neighbour's request never ended"
        self.hub.core.check_integrity()
        assert self.hub.core.load().running == self.hub.core.load().waiting == 0


def _episode(random: Random) -> Iterator[Verdict]:
    world = _World(random)
    for number in range(EPISODE):
        verdict = world.attack()
        world.settle(number)
        yield verdict
    world.finish()


TARGET = Target(
    "scheduler",
    _episode,
    ("scheduler.hub", "scheduler.codec", "scheduler.outbox", "scheduler.assets", "scheduler.peers", "scheduler.core.apply",
     "scheduler.core.scheduler", "scheduler.core.request", "scheduler.core.settings", "service.columns"),
)  # fmt: skip
