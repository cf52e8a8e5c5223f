"""The worker's gRPC shell: how it takes the end of a stream."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from octavo.v1 import scheduler_pb2

from service.discovery import Peer
from service.errors import OctavoError, Reason
from worker.__main__ import _follow
from worker.backend import BackendInfo, KVGroup
from worker.backends.mock import MockBackend, MockSettings
from worker.engine import Engine
from worker.enlist import Enlistment
from worker.session import Identity
from worker.settings import WorkerSettings

INFO = BackendInfo("mock", "n", "mock", 1000, 64, 4, 32, (KVGroup(0, 4, 10, 1, None),))


class EndedCall:
    """A stream that the scheduler has ended: gRPC fails writes with InvalidStateError, and the reader hears it a moment later."""

    async def write(self, message: scheduler_pb2.EnlistRequest) -> None:
        raise asyncio.InvalidStateError("RPC already finished.")

    async def read(self) -> scheduler_pb2.EnlistResponse:
        await asyncio.sleep(0.1)
        raise OctavoError(Reason.LOST, "you were silent")

    def cancel(self) -> bool:
        return False


def test_the_reason_of_an_end_is_told_though_a_write_failed_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stub:
        def __init__(self, channel: grpc.aio.Channel) -> None:
            self.Enlist = lambda metadata: EndedCall()

    monkeypatch.setattr("worker.enlist.scheduler_pb2_grpc.SchedulerServiceStub", Stub)

    async def main() -> None:
        engine = Engine(MockBackend(MockSettings()), lambda *_: None, lambda *_: None, lambda _: None)
        identity = Identity(scheduler_pb2.WorkerHello(), INFO, {})
        enlistment = Enlistment(WorkerSettings(scheduler=("127.0.0.1:1",)), identity, engine)
        async with asyncio.timeout(10):
            await enlistment._serve_one("127.0.0.1:1")

    with caplog.at_level(logging.ERROR, "octavo.enlist"):
        asyncio.run(main())
    assert "LOST: you were silent" in caplog.text


def test_discovery_adds_to_the_schedulers_from_flags() -> None:
    """A Redis that knows no scheduler must not make a worker forget those that it was told."""

    class Known:
        def set_schedulers(self, addresses: set[str]) -> None:
            self.addresses = addresses

    known = Known()
    changed = _follow(known, ("10.0.0.1:1",))  # type: ignore[arg-type]
    changed(frozenset())
    assert known.addresses == {"10.0.0.1:1"}
    changed(frozenset({Peer("10.0.0.2:1")}))
    assert known.addresses == {"10.0.0.1:1", "10.0.0.2:1"}
