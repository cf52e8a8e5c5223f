"""WorkerService: what a worker holds and how it does, for people and probes."""

from __future__ import annotations

from typing import Any

from octavo.v1 import worker_pb2, worker_pb2_grpc

from worker.enlist import Enlistment
from worker.session import Identity


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """Answers from the enlistment's own counters."""

    def __init__(self, identity: Identity, enlistment: Enlistment) -> None:
        self._identity = identity
        self._enlistment = enlistment

    async def GetInfo(self, request: worker_pb2.GetInfoRequest, context: Any) -> worker_pb2.GetInfoResponse:
        """What this worker holds and how it does."""
        enlistment = self._enlistment
        return worker_pb2.GetInfoResponse(
            hello=self._identity.hello,
            scheduler=enlistment.scheduler,
            epoch=enlistment.session.epoch,
            steps=enlistment.steps,
            tokens=enlistment.tokens,
            device_ns=enlistment.device_ns,
            gap_ns=enlistment.gaps.sum_ns,
        )
