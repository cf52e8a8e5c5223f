"""A scheduler's hub with one router and one worker, and the messages that both send. The core below it is the real one."""

from __future__ import annotations

from typing import Any

import numpy as np
from octavo.v1 import common_pb2, scheduler_pb2, step_pb2

from scheduler.hub import Hub, HubSettings
from scheduler.peers import RouterPeer, WorkerPeer
from service.columns import pack, unpack

DIGEST = b"d" * 32
ROUTER_HELLO = scheduler_pb2.AttachRequest(hello=scheduler_pb2.RouterHello(protocol=1, name="r"))


def hello(incarnation: int = 1, **more: Any) -> scheduler_pb2.WorkerHello:
    fields: dict[str, Any] = {
        "incarnation": incarnation,
        "protocol": 1,
        "model": "m",
        "model_digest": DIGEST,
        "vocab_size": 1000,
        "max_model_len": 64,
        "max_rows": 4,
        "max_num_batched_tokens": 32,
        "kv_groups": [scheduler_pb2.KvGroup(id=0, block_size=4, num_blocks=64)],
        "hash_version": 1,
        "name": f"w{incarnation}",
    }
    return scheduler_pb2.WorkerHello(**(fields | more))


def sampling(**more: Any) -> common_pb2.SamplingSpec:
    fields: dict[str, Any] = {"max_tokens": 3, "top_p": 1, "repetition_penalty": 1}
    return common_pb2.SamplingSpec(**(fields | more))


def submit(handle: int = 1, length: int = 5, max_tokens: int = 3, **more: Any) -> scheduler_pb2.Submit:
    fields: dict[str, Any] = {
        "handle": handle,
        "task": scheduler_pb2.TASK_GENERATE,
        "model": "m",
        "prompt": [scheduler_pb2.Segment(token_ids=pack(np.arange(length) + 20 * handle, np.int32))],
        "num_prompt_tokens": length,
        "sampling": sampling(max_tokens=max_tokens),
    }
    return scheduler_pb2.Submit(**(fields | more))


class Cluster:
    """A hub with one router and one worker whose assets have come."""

    def __init__(self, **settings: Any) -> None:
        self.hub = Hub(HubSettings(**settings), incarnation=9, first_epoch=100)
        self.router = self.hub.attach(scheduler_pb2.RouterHello(incarnation=3, protocol=1, name="r"), 0.0)
        self.worker = self.enlist(hello())
        self.from_router()
        self.from_worker()

    def enlist(self, hello: scheduler_pb2.WorkerHello, now: float = 0.0) -> WorkerPeer:
        worker = self.hub.enlist(hello, now)
        if worker.incoming is not None:
            chunk = common_pb2.AssetChunk(name="config.json", size=2, data=b"{}")
            self.say_worker(worker, asset=chunk)
            self.say_worker(worker, assets_end=scheduler_pb2.AssetsEnd(digest=hello.model_digest))
        return worker

    def say(self, now: float = 0.0, **message: Any) -> None:
        self.hub.on_router(self.router, scheduler_pb2.AttachRequest(epoch=self.router.epoch, **message), now)

    def say_worker(self, worker: WorkerPeer | None = None, now: float = 0.0, **message: Any) -> None:
        worker = worker or self.worker
        self.hub.on_worker(worker, scheduler_pb2.EnlistRequest(epoch=worker.epoch, **message), now)

    def answer(self, plan: step_pb2.StepPlan, token: int = 42, now: float = 0.0, **more: Any) -> None:
        samples = int(unpack("", plan.num_samples, np.uint8).sum())
        fields: dict[str, Any] = {
            "epoch": plan.epoch,
            "step_id": plan.step_id,
            "status": step_pb2.STEP_STATUS_OK,
            "num_tokens": bytes([1] * samples),
            "token_ids": pack([token] * samples, np.int32),
        }
        self.say_worker(now=now, result=step_pb2.StepResult(**(fields | more)))

    def from_router(self, router: RouterPeer | None = None) -> list[scheduler_pb2.AttachResponse]:
        peer = router or self.router
        return list(iter(lambda: peer.take(0.0), None))

    def from_worker(self, worker: WorkerPeer | None = None) -> list[scheduler_pb2.EnlistResponse]:
        peer = worker or self.worker
        return list(iter(lambda: peer.take(0.0), None))

    def plans(self, now: float = 0.0) -> list[step_pb2.StepPlan]:
        while self.hub.plan(now):
            pass
        return [message.plan for message in self.from_worker() if message.HasField("plan")]


def failures(messages: list[scheduler_pb2.AttachResponse]) -> list[tuple[int, int]]:
    return [(m.failed.handle, m.failed.reason) for m in messages if m.HasField("failed")]
