"""What operators ask a scheduler: its workers, and its state live."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from octavo.client.connection import Connection
from octavo.client.errors import decode
from octavo.v1 import scheduler_pb2
from octavo.v1.scheduler_pb2_grpc import SchedulerServiceStub

_TIMEOUT = 10.0


class AdminClient:
    """Talks to one scheduler, the first address of the connection. Raises OctavoError; close it, or use `with`."""

    def __init__(self, connection: Connection) -> None:
        self._metadata = connection.metadata
        self._channel = connection.open_sync(connection.addresses[0])
        self._stub = SchedulerServiceStub(self._channel)

    def list_workers(self) -> list[scheduler_pb2.WorkerStatus]:
        """The workers that are enlisted."""
        with _decoded():
            response = self._stub.ListWorkers(
                scheduler_pb2.ListWorkersRequest(), timeout=_TIMEOUT, metadata=self._metadata
            )
        return list(response.workers)

    def drain_worker(self, incarnation: int) -> None:
        """Give a worker no new requests; its process ends when the running ones are done."""
        with _decoded():
            request = scheduler_pb2.DrainWorkerRequest(incarnation=incarnation)
            self._stub.DrainWorker(request, timeout=_TIMEOUT, metadata=self._metadata)

    def admit_digest(self, model: str, digest: bytes) -> None:
        """Allow workers with a further digest (32 bytes) under a model name."""
        with _decoded():
            request = scheduler_pb2.AdmitDigestRequest(model=model, digest=digest)
            self._stub.AdmitDigest(request, timeout=_TIMEOUT, metadata=self._metadata)

    def inspect(self, *, once: bool = False, max_hz: int = 2, rows: bool = False) -> Generator[Snapshot, None, None]:
        """The scheduler's state, whole each time: after each message, or once. The same object is updated and given again."""
        request = scheduler_pb2.InspectRequest(max_hz=max_hz, rows=rows, once=once)
        call: Any = self._stub.Inspect(request, timeout=_TIMEOUT if once else None, metadata=self._metadata)
        snapshot = Snapshot()
        try:
            with _decoded():
                for message in call:
                    snapshot.update(message)
                    yield snapshot
        finally:
            call.cancel()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class Snapshot:
    """The state of a scheduler, put together from a full message and the differences after it."""

    uptime_ms: int = 0
    queue: scheduler_pb2.QueueStatus = field(default_factory=scheduler_pb2.QueueStatus)
    workers: dict[int, scheduler_pb2.WorkerInspection] = field(default_factory=dict)  # by incarnation

    def update(self, message: scheduler_pb2.InspectResponse) -> None:
        """Take the next message."""
        if message.full:
            self.workers.clear()
        self.uptime_ms = message.uptime_ms
        if message.HasField("queue"):
            self.queue = message.queue
        for worker in message.workers:
            self.workers[worker.status.incarnation] = worker
        for incarnation in message.gone:
            self.workers.pop(incarnation, None)


def first_snapshot(admin: AdminClient, *, rows: bool = False) -> Snapshot | None:
    """The state now, or None from a scheduler that ends the stream without a word. Raises OctavoError."""
    with closing(admin.inspect(once=True, rows=rows)) as snapshots:
        return next(snapshots, None)


@contextmanager
def _decoded() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise decode(error) from None
