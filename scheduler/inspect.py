"""What an operator sees: workers, queue, plans and block tables. No token ids, no text."""

from __future__ import annotations

import dataclasses

import numpy as np
from octavo.v1 import scheduler_pb2

from scheduler.core import WorkerSnapshot
from scheduler.hub import Hub
from scheduler.peers import WorkerPeer
from service.columns import pack


def worker_status(peer: WorkerPeer, snapshot: WorkerSnapshot) -> scheduler_pb2.WorkerStatus:
    """One worker as the scheduler sees it."""
    hello = peer.hello
    return scheduler_pb2.WorkerStatus(
        incarnation=hello.incarnation,
        name=hello.name,
        model=hello.model,
        model_digest=hello.model_digest,
        backend=hello.backend,
        quantization=hello.quantization,
        address=hello.address,
        epoch=peer.epoch,
        draining=peer.draining,
        running=snapshot.rows.size,
        max_rows=snapshot.num_rows,
        blocks_total=snapshot.free_blocks + snapshot.used_blocks + snapshot.cached_blocks,
        blocks_used=snapshot.used_blocks,
        blocks_cached=snapshot.cached_blocks,
        last_step=peer.last_step,
        plans_in_flight=len(snapshot.in_flight),
    )


def list_workers(hub: Hub) -> list[scheduler_pb2.WorkerStatus]:
    """All enlisted workers."""
    return [worker_status(hub.workers[worker.worker_id], worker) for worker in hub.core.snapshot().workers]


def inspect(hub: Hub, request: scheduler_pb2.InspectRequest, uptime_ms: int) -> scheduler_pb2.InspectResponse:
    """A full snapshot."""
    snapshot = hub.core.snapshot()
    load = hub.core.load()
    queue = scheduler_pb2.QueueStatus(
        waiting=load.waiting,
        waiting_tokens=sum(queue.num_tokens for queue in snapshot.queues),
        running=load.running,
        counters=counters(hub),
    )
    answer = scheduler_pb2.InspectResponse(full=True, uptime_ms=uptime_ms, queue=queue)
    for worker in snapshot.workers:
        peer = hub.workers[worker.worker_id]
        if request.worker in (0, peer.hello.incarnation):
            view = scheduler_pb2.WorkerInspection(status=worker_status(peer, worker), last_plan=peer.last_plan)
            if request.rows:
                view.rows.extend(_rows(worker))
            answer.workers.append(view)
    return answer


def only_changes(
    new: scheduler_pb2.InspectResponse, old: scheduler_pb2.InspectResponse
) -> scheduler_pb2.InspectResponse:
    """`new` without the workers that stand in `old` just as they are, and with those that left."""
    before = {worker.status.incarnation: worker for worker in old.workers}
    answer = scheduler_pb2.InspectResponse(full=False, uptime_ms=new.uptime_ms, queue=new.queue)
    for worker in new.workers:
        if before.pop(worker.status.incarnation, None) != worker:
            answer.workers.append(worker)
    answer.gone.extend(before)
    return answer


def counters(hub: Hub) -> dict[str, int]:
    """Totals since the start, flat: enum-keyed ones as name_KEY."""
    flat: dict[str, int] = {}
    for field in dataclasses.fields(hub.core.counters):
        value = getattr(hub.core.counters, field.name)
        if isinstance(value, dict):
            flat |= {f"{field.name}_{key.name.lower()}": count for key, count in value.items() if count}
        else:
            flat[field.name] = int(value)
    return flat


def _rows(worker: WorkerSnapshot) -> list[scheduler_pb2.RowInspection]:
    return [
        scheduler_pb2.RowInspection(
            row=int(worker.rows[at]),
            num_prompt_tokens=int(worker.num_prompt[at]),
            num_tokens=int(worker.num_tokens[at]),
            num_computed=int(worker.num_computed[at]),
            block_ids=pack(worker.block_tables[at], np.int32),
            priority=int(worker.priority[at]),
        )
        for at in range(worker.rows.size)
    ]
