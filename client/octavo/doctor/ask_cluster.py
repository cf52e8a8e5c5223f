"""Asks the processes of a cluster what `check_cluster` judges. Every call has a limit of time: one that hangs is found, too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from octavo.client.connection import Connection
from octavo.client.errors import decode
from octavo.doctor.cluster import Cluster, Model, Service, Worker, answered
from octavo.v1 import inference_pb2, scheduler_pb2
from octavo.v1.inference_pb2_grpc import InferenceServiceStub
from octavo.v1.scheduler_pb2_grpc import SchedulerServiceStub

_TIMEOUT = 5.0
_PAUSE = 0.2
_AT_ONCE = 16  # workers asked, so that many that hang take little longer than one
# grpc.health.v1.HealthCheckResponse with its one field; the wheel does without grpcio-health-checking.
_HEALTH = {b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING"}
_FILES = {"router": inference_pb2.DESCRIPTOR, "scheduler": scheduler_pb2.DESCRIPTOR}
_NAMES = {"router": "octavo.v1.InferenceService", "scheduler": "octavo.v1.SchedulerService"}


def read_cluster(routers: Connection, schedulers: Connection | None, expected: bool) -> Cluster:
    """Ask every router and scheduler, and the workers that they tell of. `schedulers`: None where they can't be reached."""
    asked_routers: list[Service] = []
    models: dict[str, Model] = {}
    for address in routers.addresses:
        with routers.open_sync(address) as channel:
            service = _service("router", channel, address, routers)
            if answered(service):
                service, found = _models(service, channel, routers)
                models |= {model.name: model for model in found}
            asked_routers.append(service)
    asked_schedulers: list[Service] = []
    workers: list[Worker] = []
    for address in () if schedulers is None else schedulers.addresses:
        assert schedulers is not None
        with schedulers.open_sync(address) as channel:
            service = _service("scheduler", channel, address, schedulers)
            if answered(service):
                service, statuses = _workers(service, channel, schedulers)
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    workers += pool.map(lambda status: _worker(status, schedulers), statuses)
            asked_schedulers.append(service)
    return Cluster(
        expected=expected,
        routers=tuple(asked_routers),
        schedulers=tuple(asked_schedulers),
        models=tuple(models.values()),
        workers=tuple(workers),
    )


def _service(kind: str, channel: grpc.Channel, address: str, connection: Connection) -> Service:
    health = _health(channel)
    same = _same_contracts(kind, channel, connection) if health in _HEALTH.values() else None
    return Service(kind=kind, address=address, health=health, same_contracts=same)


def _health(channel: grpc.Channel) -> str:
    check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
    try:
        answer = check(b"", timeout=_TIMEOUT)
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    return _HEALTH.get(answer, "an answer that is no health")


def _models(service: Service, channel: grpc.Channel, connection: Connection) -> tuple[Service, list[Model]]:
    """A router that has just started may still be fetching a tokenizer: it is given a moment."""
    deadline = time.monotonic() + _TIMEOUT
    while True:
        try:
            answer = InferenceServiceStub(channel).ListModels(
                inference_pb2.ListModelsRequest(), timeout=_TIMEOUT, metadata=connection.metadata
            )
        except grpc.RpcError as error:
            return _refused(service, error), []
        if all(model.ready for model in answer.models) or time.monotonic() > deadline:
            found = [Model(name=model.name, workers=model.workers, ready=model.ready) for model in answer.models]
            return service, found
        time.sleep(_PAUSE)


def _workers(
    service: Service, channel: grpc.Channel, connection: Connection
) -> tuple[Service, list[scheduler_pb2.WorkerStatus]]:
    try:
        answer = SchedulerServiceStub(channel).ListWorkers(
            scheduler_pb2.ListWorkersRequest(), timeout=_TIMEOUT, metadata=connection.metadata
        )
    except grpc.RpcError as error:
        return _refused(service, error), []
    return service, list(answer.workers)


def _refused(service: Service, error: grpc.RpcError) -> Service:
    return Service(
        kind=service.kind,
        address=service.address,
        health=service.health,
        same_contracts=service.same_contracts,
        refused=str(decode(error)),
    )


def _worker(status: scheduler_pb2.WorkerStatus, connection: Connection) -> Worker:
    with connection.open_sync(status.address) as channel:
        health = _health(channel)
    return Worker(
        name=status.name,
        model=status.model,
        digest=status.model_digest.hex(),
        backend=status.backend,
        address=status.address,
        draining=status.draining,
        running=status.running,
        blocks_used=status.blocks_used,
        blocks_total=status.blocks_total,
        health=health,
    )


def _same_contracts(kind: str, channel: grpc.Channel, connection: Connection) -> bool | None:
    """Whether the process was started with the .proto files of this client; None without the package or the answer."""
    try:
        from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
    except ModuleNotFoundError:  # the wheel does without
        return None
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=_NAMES[kind])
    ours = _FILES[kind]
    try:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = stub.ServerReflectionInfo(iter([request]), timeout=_TIMEOUT, metadata=connection.metadata)
        files = list(_descriptors(answers, ours.name))
    except grpc.RpcError:  # needs a key that we have not got, or is switched off
        return None
    return all(file == ours.serialized_pb for file in files) if files else None


def _descriptors(answers: Any, name: str) -> Iterator[bytes]:
    """The file of this name, serialised."""
    from google.protobuf import descriptor_pb2

    for answer in answers:
        for serialised in answer.file_descriptor_response.file_descriptor_proto:
            if descriptor_pb2.FileDescriptorProto.FromString(serialised).name == name:
                yield serialised
