"""The gRPC shell of Attach: one supervised client stream for each scheduler, dialled again whenever it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

import grpc
from octavo.v1 import scheduler_pb2, scheduler_pb2_grpc

from router.hub import Hub, Outbound
from service.errors import OctavoError, Reason, how_it_ended

log = logging.getLogger("octavo.router.attach")

Metadata = tuple[tuple[str, str], ...]
_FIRST_BACKOFF = 0.05
_MAX_BACKOFF = 1.0
_FAREWELL_SECONDS = 1.0  # for the status of a stream that takes no more messages
_MAX_ASSET_BYTES = 512 << 20


class Attachments:
    """Streams to all schedulers known. Owned by the event loop; `close` ends them all."""

    def __init__(self, hub: Hub, open_channel: Callable[[str], grpc.aio.Channel], metadata: Metadata = ()) -> None:
        """`metadata` proves that we belong to the cluster."""
        self._hub = hub
        self._open_channel = open_channel
        self._metadata = metadata
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._defect: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def num_known(self) -> int:
        """Schedulers that are dialled."""
        return len(self._tasks)

    def set_addresses(self, addresses: Iterable[str]) -> None:
        """These schedulers exist: dial the new ones, leave those that are gone."""
        wanted = set(addresses)
        for address in set(self._tasks) - wanted:
            task = self._tasks.pop(address)
            task.cancel()
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        for address in wanted - set(self._tasks):
            self._tasks[address] = task = asyncio.get_running_loop().create_task(self._keep(address))
            task.add_done_callback(self._on_end)

    async def watch(self) -> None:
        """Wait for ever; raises what no stream may raise: a defect of ours, which must end the process."""
        await self._defect

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._defect.done():
            return
        defect = task.exception()
        if defect is not None:
            self._defect.set_exception(defect)

    async def fetch_assets(self, digest: bytes) -> dict[str, bytes]:
        """The files of a model, from whichever scheduler has them. Raises NO_WORKER."""
        problem = "no scheduler is attached"
        for address, channel in list(self._channels.items()):
            stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            try:
                call = stub.FetchAssets(
                    scheduler_pb2.FetchAssetsRequest(digest=digest), metadata=self._metadata, timeout=60.0
                )
                return await _collect(call)
            except grpc.aio.AioRpcError as error:
                problem = f"{address}: {error.details()}"
            except OctavoError as error:
                problem = f"{address}: {error.message}"
        raise OctavoError(Reason.NO_WORKER, f"the model's tokenizer can't be fetched: {problem}", retry_after_ms=1_000)

    async def close(self) -> None:
        """End all streams. Those of schedulers that were told goodbye may end by themselves; the hub's clock must run until then."""
        tasks = [*self._tasks.values(), *self._leaving]
        self._tasks.clear()
        if tasks and self._hub.leaving.is_set():
            await asyncio.wait(tasks, timeout=_FAREWELL_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, address: str) -> None:
        """Attach, and attach again, until cancelled or until the hub leaves."""
        backoff = _FIRST_BACKOFF
        channel = self._open_channel(address)
        self._channels[address] = channel
        try:
            while not self._hub.leaving.is_set():
                heard = await self._attach_once(address, channel)
                backoff = _FIRST_BACKOFF if heard else min(_MAX_BACKOFF, backoff * 2)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(backoff * random.uniform(0.5, 1.0)):
                        await self._hub.leaving.wait()
        finally:
            self._channels.pop(address, None)
            await channel.close()

    async def _attach_once(self, address: str, channel: grpc.aio.Channel) -> bool:
        """One stream, from Hello to its end, or until the hub closes it. Returns whether the scheduler said anything."""
        stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        call = stub.Attach(metadata=self._metadata)
        outbound = self._hub.link_opened(address)
        heard = asyncio.Event()
        reader = asyncio.create_task(self._read(call, address, heard), name=f"read {address}")
        writer = asyncio.create_task(_write(call, outbound), name=f"write {address}")
        try:
            # Not the writer alone decides: it may hang in a stream that the scheduler does not read.
            waiting: list[asyncio.Future[Any]] = [reader, writer, outbound.ended]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not outbound.closed:
                await asyncio.wait([reader], timeout=_FAREWELL_SECONDS)
        finally:
            reader.cancel()
            writer.cancel()
            call.cancel()
            was_closed = outbound.closed
            # Before anything is awaited: a second cancellation must not leave the link on the books.
            self._hub.link_closed(address)
            results = await asyncio.gather(reader, writer, return_exceptions=True)
        for result in results:
            if isinstance(result, grpc.aio.AioRpcError):
                log.log(_level(heard), "scheduler at %s: %s", address, how_it_ended(result))
                break
            if isinstance(result, Exception) and not isinstance(result, asyncio.InvalidStateError):
                raise result
        else:
            how = "cut" if was_closed else "ended"
            level = logging.INFO if self._hub.leaving.is_set() else _level(heard)
            log.log(level, "the stream to the scheduler at %s: %s", address, how)
        return heard.is_set()

    async def _read(self, call: Any, address: str, heard: asyncio.Event) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            if message is None:  # gRPC's client says so of bytes that it can't decode
                log.warning("the scheduler at %s sent bytes that are no message", address)
                return
            heard.set()
            self._hub.receive(address, message)


def _level(heard: asyncio.Event) -> int:
    return logging.WARNING if heard.is_set() else logging.DEBUG


async def _write(call: Any, outbound: Outbound) -> None:
    """Empty the queue into the stream. gRPC answers InvalidStateError in a stream that ended; the reader hears why."""
    while (message := await outbound.get()) is not None:
        await call.write(message)


async def _collect(call: Any) -> dict[str, bytes]:
    files: dict[str, bytearray] = {}
    name, total = "", 0
    async for message in call:
        if message is None:  # as in _read
            raise OctavoError(Reason.PROTOCOL_VIOLATION, "bytes that are no message")
        chunk = message.chunk
        name = chunk.name or name
        total += len(chunk.data)
        if not name or total > _MAX_ASSET_BYTES:
            raise OctavoError(Reason.PROTOCOL_VIOLATION, "assets without a name, or more than 512 MiB of them")
        files.setdefault(name, bytearray()).extend(chunk.data)
    return {name: bytes(data) for name, data in files.items()}
