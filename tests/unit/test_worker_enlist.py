"""The worker's gRPC shell: how it takes the end of a stream."""

from __future__ import annotations

import asyncio
import logging
import threading

import grpc
import numpy as np
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
from worker.step import Step, StepOutput

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


class BrokenCall(EndedCall):
    """A write comes after the stream's end: gRPC's client makes up a status of its own, and the reader hears that."""

    async def write(self, message: scheduler_pb2.EnlistRequest) -> None:
        return

    async def read(self) -> scheduler_pb2.EnlistResponse:
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details="Internal error from Core"
        )


def test_a_stream_that_was_cut_while_we_wrote_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stub:
        def __init__(self, channel: grpc.aio.Channel) -> None:
            self.Enlist = lambda metadata: BrokenCall()

    monkeypatch.setattr("worker.enlist.scheduler_pb2_grpc.SchedulerServiceStub", Stub)

    async def main() -> None:
        engine = Engine(MockBackend(MockSettings()), lambda *_: None, lambda *_: None, lambda _: None)
        enlistment = Enlistment(
            WorkerSettings(scheduler=("127.0.0.1:1",)), Identity(scheduler_pb2.WorkerHello(), INFO, {}), engine
        )
        async with asyncio.timeout(10):
            await enlistment._serve_one("127.0.0.1:1")

    with caplog.at_level(logging.WARNING, "octavo.enlist"):
        asyncio.run(main())
    assert "cut us off for our silence" in caplog.text and "from Core" not in caplog.text


class RefusedCall(EndedCall):
    """A stream of a scheduler that does not want us."""

    async def write(self, message: scheduler_pb2.EnlistRequest) -> None:
        return

    async def read(self) -> scheduler_pb2.EnlistResponse:
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.FAILED_PRECONDITION, grpc.aio.Metadata(), grpc.aio.Metadata(), details="not admitted"
        )


@pytest.mark.parametrize("retry_s", [0.001, 60.0])
def test_a_worker_that_is_refused_asks_less_and_less_often_says_so_once_and_leaves_when_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, retry_s: float
) -> None:
    tries: list[float] = []
    refused, told = asyncio.Event(), threading.Event()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "FAILED_PRECONDITION" in record.getMessage():
                told.set()

    ear = Ear()
    logging.getLogger("octavo.enlist").addHandler(ear)
    monkeypatch.setattr("worker.enlist._RETRY_SECONDS", retry_s)
    monkeypatch.setattr("worker.enlist._REFUSED_SECONDS", 60.0)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        class Stub:
            def __init__(self, channel: grpc.aio.Channel) -> None:
                self.Enlist = self.enlist

            def enlist(self, metadata: object) -> RefusedCall:
                tries.append(loop.time())
                if len(tries) == (6 if retry_s < 1 else 1):
                    refused.set()
                return RefusedCall()

        monkeypatch.setattr("worker.enlist.scheduler_pb2_grpc.SchedulerServiceStub", Stub)
        engine = Engine(MockBackend(MockSettings()), lambda *_: None, lambda *_: None, lambda _: None)
        engine.start()
        identity = Identity(scheduler_pb2.WorkerHello(), INFO, {})
        enlistment = Enlistment(WorkerSettings(scheduler=("127.0.0.1:1",)), identity, engine)
        async with asyncio.timeout(30):
            running = asyncio.create_task(enlistment.run())
            await refused.wait()
            async with asyncio.timeout(20):
                await asyncio.to_thread(told.wait)
            enlistment.drain()
            await running
        engine.close()

    try:
        with caplog.at_level(logging.INFO, "octavo.enlist"):
            asyncio.run(main())
    finally:
        logging.getLogger("octavo.enlist").removeHandler(ear)
    assert caplog.text.count("FAILED_PRECONDITION: not admitted") == 1
    pauses = np.diff(tries)
    assert (pauses > 0.0009 * 2.0 ** np.arange(1, 1 + pauses.size)).all()


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


def test_no_hello_before_the_device_has_ended_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that hangs would take plans again, and lose them again."""
    backend = MockBackend(MockSettings(block_size=4, num_blocks=8, max_rows=2, max_model_len=16))
    dialled = asyncio.Event()
    collecting, release = threading.Event(), threading.Event()

    def collect() -> StepOutput:
        collecting.set()
        assert release.wait(30)
        return MockBackend.collect(backend)

    monkeypatch.setattr(backend, "collect", collect)
    monkeypatch.setattr("worker.enlist._PATIENCE_SECONDS", 0.05)

    async def serve_one(self: Enlistment, address: str) -> None:
        dialled.set()

    monkeypatch.setattr(Enlistment, "_serve_one", serve_one)

    async def main() -> None:
        engine = Engine(backend, lambda *_: None, lambda *_: None, lambda _: None)
        engine.start()
        none = np.zeros(0, np.int32)
        engine.submit(1, Step(1, none, (), none, none, none, none, none, none, none, none))
        await asyncio.to_thread(collecting.wait, 10)
        enlistment = Enlistment(
            WorkerSettings(scheduler=("127.0.0.1:1",)), Identity(scheduler_pb2.WorkerHello(), INFO, {}), engine
        )
        running = asyncio.create_task(enlistment.run())
        async with asyncio.timeout(30):
            await asyncio.sleep(0.2)
            assert not dialled.is_set()
            release.set()
            await dialled.wait()
            running.cancel()
            # And who is told to leave meanwhile does not wait for the device.
            collecting.clear()
            release.clear()
            engine.submit(1, Step(2, none, (), none, none, none, none, none, none, none, none))
            await asyncio.to_thread(collecting.wait, 10)
            running = asyncio.create_task(enlistment.run())
            await asyncio.sleep(0.1)
            enlistment.drain()
            await running
            release.set()
        assert await asyncio.to_thread(engine.close, 10)

    asyncio.run(main())


@pytest.mark.parametrize("frozen", ["127.0.0.1:1", "127.0.0.1:2"])
def test_a_frozen_scheduler_does_not_hold_up_the_choice_of_another(
    monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    cancelled: list[str] = []

    async def count(self: Enlistment, address: str) -> int | None:
        if address == "127.0.0.1:3":
            return None  # answers with an error, and first
        await asyncio.sleep(0.01)
        if address != frozen:
            return 5
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(address)
            raise
        raise AssertionError

    monkeypatch.setattr(Enlistment, "_count_workers", count)

    async def main() -> str:
        engine = Engine(MockBackend(MockSettings()), lambda *_: None, lambda *_: None, lambda _: None)
        identity = Identity(scheduler_pb2.WorkerHello(), INFO, {})
        addresses = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
        enlistment = Enlistment(WorkerSettings(scheduler=addresses), identity, engine)
        async with asyncio.timeout(10):
            return await enlistment._choose()

    assert asyncio.run(main()) == ({"127.0.0.1:1", "127.0.0.1:2"} - {frozen}).pop()
    assert cancelled == [frozen]


def test_a_worker_that_knows_no_scheduler_ends_at_once_when_told() -> None:
    async def main() -> None:
        engine = Engine(MockBackend(MockSettings()), lambda *_: None, lambda *_: None, lambda _: None)
        identity = Identity(scheduler_pb2.WorkerHello(), INFO, {})
        enlistment = Enlistment(WorkerSettings(redis="redis://127.0.0.1:1"), identity, engine)
        running = asyncio.create_task(enlistment.run())
        await asyncio.sleep(0.01)
        enlistment.set_schedulers(())
        enlistment.drain()
        async with asyncio.timeout(10):
            await running

    asyncio.run(main())
