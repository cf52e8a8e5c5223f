"""The gRPC shell of a worker: dials a scheduler, carries messages between its stream, the session and the engine.

Owned by the event loop. The engine's threads reach it through `call_soon_threadsafe` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from typing import Any

import grpc
from octavo.v1 import scheduler_pb2, scheduler_pb2_grpc

from service.auth import credentials, read_token
from service.errors import OctavoError, how_it_ended
from service.server import open_channel
from service.trace import Trace
from worker.engine import Engine
from worker.gaps import GapHistogram
from worker.session import Action, Execute, Identity, Leave, WorkerSession
from worker.settings import WorkerSettings
from worker.step import StepOutput

log = logging.getLogger("octavo.enlist")

_MAX_OUTBOUND = 4096  # messages; assets are the largest burst, 1 MiB a message
_RETRY_SECONDS = 0.2
_AGAIN_SECONDS = 0.02  # after a stream that had been welcomed
_OTHERS_SECONDS = 0.03
_REFUSED_SECONDS = (
    5.0  # at most, and sooner at first, after a scheduler said why it does not want us: that changes by people's hands
)
_REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED)
_FAREWELL_SECONDS = 1.0
_PATIENCE_SECONDS = 1.0

_Stream = grpc.aio.StreamStreamCall[scheduler_pb2.EnlistRequest, scheduler_pb2.EnlistResponse]


class Enlistment:
    """Keeps one worker enlisted, with one scheduler at a time, until it is stopped."""

    def __init__(
        self, settings: WorkerSettings, identity: Identity, engine: Engine, trace: Trace | None = None
    ) -> None:
        self._settings = settings
        self._metadata = credentials(read_token(settings.cluster_token_file))
        self._model = identity.hello.model
        self._engine = engine
        self._trace = trace
        self.session = WorkerSession(identity)
        self._addresses: tuple[str, ...] = settings.scheduler
        self._addresses_known = asyncio.Event()
        if self._addresses:
            self._addresses_known.set()
        self._outbound: asyncio.Queue[scheduler_pb2.EnlistRequest] = asyncio.Queue(_MAX_OUTBOUND)
        self._leave: asyncio.Future[Leave] | None = None
        self._redial_to = ""
        self._let_go = self._was_welcomed = False
        self._refusals = 0  # in a row
        self._told = ""
        self._draining = asyncio.Event()
        self.welcomed = asyncio.Event()
        self.scheduler = ""
        self.steps = self.tokens = self.device_ns = 0
        self.gaps = GapHistogram()

    def set_schedulers(self, addresses: Iterable[str]) -> None:
        """Discovery knows these schedulers now."""
        self._addresses = tuple(sorted(addresses))
        if self._addresses:
            self._addresses_known.set()
        else:
            self._addresses_known.clear()

    async def run(self) -> None:
        """Enlist, serve, and enlist again; until cancelled, drained, or let go by a scheduler, which an operator has asked to."""
        while True:
            await self._addresses_known.wait()
            if self.session.draining:
                return
            if await self._reset_engine():
                address = self._redial_to or await self._choose()
                self._redial_to = ""
                self._was_welcomed = False
                if address:
                    await self._serve_one(address)
            if self.session.draining or self._let_go:
                return
            pause = _AGAIN_SECONDS if self._was_welcomed else _RETRY_SECONDS
            if self._refusals:
                pause = min(_REFUSED_SECONDS, _RETRY_SECONDS * 2.0 ** min(self._refusals, 8))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), pause)

    def drain(self) -> None:
        """Ask for no new requests; `run` returns when the scheduler lets the worker go, and at once where there is none."""
        self._addresses_known.set()
        self._draining.set()
        message = self.session.drain()
        if message is not None:
            self._send(message)
        else:
            self._end(Leave("draining"))

    def on_output(self, epoch: int, output: StepOutput) -> None:
        """The engine finished a step."""
        began = self._trace.now() if self._trace is not None else 0
        self.steps += 1
        self.tokens += int(output.num_tokens.sum())
        self.device_ns += output.device_ns
        self.gaps.add(output.gap_ns)
        message = self.session.on_output(epoch, output, self._now())
        if message is not None:
            self._send(message)
        if self._trace is not None:
            self._trace.add("report", output.step_id, began)

    def on_failure(self, epoch: int, step_id: int, text: str) -> None:
        """The engine could not run a step."""
        self._perform(self.session.on_step_failed(epoch, step_id, text))

    async def _reset_engine(self) -> bool:
        """Wait until the device has ended what it was given and forgotten its rows: whoever enlists with steps of an earlier epoch
        still running takes plans that wait behind them, and loses those, too, if the device hangs. False: we are to leave.
        """
        self._leave = leave = asyncio.get_running_loop().create_future()
        reset = asyncio.wrap_future(self._engine.reset())
        waiting: list[asyncio.Future[Any]] = [reset, leave]
        done, _ = await asyncio.wait(waiting, timeout=_PATIENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            log.warning("steps of an earlier stream are still on the device; enlisting once they have ended")
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return not leave.done()

    async def _choose(self) -> str:
        """The scheduler with the fewest workers for our model among those that answer; empty if none does.

        One that is frozen answers never, and its clients wait for us at another one: so the others get a moment after the first.
        """
        if len(self._addresses) == 1:
            return self._addresses[0]
        asked = {asyncio.create_task(self._count_workers(address)): address for address in self._addresses}
        try:
            known: list[tuple[int, str]] = []
            pending = set(asked)
            while pending and not known:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if pending:
                    more, pending = await asyncio.wait(pending, timeout=_OTHERS_SECONDS)
                    done |= more
                known = [(count, asked[task]) for task in done if (count := task.result()) is not None]
        finally:
            for task in asked:
                task.cancel()
            await asyncio.wait(asked)
        return min(known)[1] if known else ""

    async def _count_workers(self, address: str) -> int | None:
        async with open_channel(self._settings, address) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            try:
                answer = await stub.ListWorkers(
                    scheduler_pb2.ListWorkersRequest(), metadata=self._metadata, timeout=1.0, wait_for_ready=False
                )
            except grpc.aio.AioRpcError as error:
                log.info("scheduler %s: %s", address, error.details())
                return None
        return sum(worker.model == self._model for worker in answer.workers)

    async def _serve_one(self, address: str) -> None:
        """One stream, from dialling to its end. The engine has been reset."""
        self._outbound = asyncio.Queue(_MAX_OUTBOUND)
        self._leave = asyncio.get_running_loop().create_future()
        async with open_channel(self._settings, address) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            call = stub.Enlist(metadata=self._metadata)
            self._send(self.session.connected(self._now()))
            tasks = [
                asyncio.create_task(self._write(call), name="enlist-write"),
                asyncio.create_task(self._read(call, address), name="enlist-read"),
                asyncio.create_task(self._tick(), name="enlist-tick"),
            ]
            try:
                waiting: list[asyncio.Future[Any]] = [*tasks, self._leave]
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._leave.done():
                    await self._flush(tasks[0])
                elif tasks[0].done():
                    # A stream that ended takes no messages; the reader hears why a moment later.
                    await asyncio.wait([tasks[1]], timeout=_FAREWELL_SECONDS)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                call.cancel()
                self.session.disconnected()
                self.welcomed.clear()
                self.scheduler = ""
        self._report(address, results)

    async def _flush(self, writer: asyncio.Task[None]) -> None:
        """Let what was said before leaving (a failed step) reach the scheduler."""
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                joined = asyncio.create_task(self._outbound.join())
                await asyncio.wait([joined, writer], return_when=asyncio.FIRST_COMPLETED)
                joined.cancel()
        except TimeoutError:
            log.warning("the scheduler did not take our last messages")

    def _report(self, address: str, results: list[BaseException | None]) -> None:
        refusals, self._refusals = self._refusals, 0
        if self._leave is not None and self._leave.done():
            leave = self._leave.result()
            self._redial_to = leave.address
            self._let_go = leave.for_good
            log.info("left scheduler %s: %s", address, leave.reason)
            return
        for result in results:
            if isinstance(result, grpc.aio.AioRpcError):
                said = f"scheduler {address}: {result.code().name}: {how_it_ended(result)}"
                if result.code() in _REFUSALS and not self._was_welcomed:
                    self._refusals = refusals + 1
                    again = self._told == said and refusals
                    log.log(logging.DEBUG if again else logging.WARNING, "%s", said)
                    self._told = said
                    return
                log.warning("%s", said)
                return
            if isinstance(result, OctavoError):
                log.error("scheduler %s: %s: %s", address, result.reason.name, result.message)
                return
            if isinstance(result, Exception) and not isinstance(result, asyncio.InvalidStateError):
                raise result
        log.warning("scheduler %s closed the stream", address)

    async def _write(self, call: _Stream) -> None:
        while True:
            message = await self._outbound.get()
            began = self._trace.now() if self._trace is not None else 0
            await call.write(message)
            self._outbound.task_done()
            if self._trace is not None and message.HasField("result"):
                self._trace.add("send result", message.result.step_id, began)

    async def _read(self, call: _Stream, address: str) -> None:
        while True:
            message = await call.read()
            if not isinstance(message, scheduler_pb2.EnlistResponse):  # grpc.aio.EOF
                return
            began = self._trace.now() if self._trace is not None else 0
            self._perform(self.session.on_message(message, self._now()))
            if self._trace is not None and message.HasField("plan"):
                self._trace.add("receive plan", message.plan.step_id, began)
            if self.session.epoch and not self.welcomed.is_set():
                self.scheduler = address
                self.welcomed.set()
                self._was_welcomed = True
                log.info("enlisted with %s, epoch %d", address, self.session.epoch)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.session.tick_s)
            self._perform(self.session.tick(self._now()))

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Execute):
                self._engine.submit(action.epoch, action.step)
            elif isinstance(action, Leave):
                self._end(action)
            else:
                self._send(action)

    def _send(self, message: scheduler_pb2.EnlistRequest) -> None:
        try:
            self._outbound.put_nowait(message)
        except asyncio.QueueFull:
            self._end(Leave(f"{_MAX_OUTBOUND} messages wait to be sent: the scheduler does not read"))

    def _end(self, leave: Leave) -> None:
        if self._leave is not None and not self._leave.done():
            self._leave.set_result(leave)

    def _now(self) -> float:
        return time.monotonic()  # uvloop's clock stands still within a turn of the loop
