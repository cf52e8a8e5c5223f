"""Read-only views of the scheduler for inspectors, load reports and metrics. Copies, and never token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scheduler.core.plan import Int64Array
from scheduler.core.request import Int32Array, Request
from scheduler.core.state import SchedulerState, WorkerState


@dataclass(frozen=True, slots=True)
class Load:
    """For routers that choose between schedulers."""

    waiting: int
    running: int
    workers: int
    kv_used: float
    """Share of blocks that rows own, 0 to 1."""


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """The waiting requests of one model digest."""

    digest: bytes
    num_requests: int
    num_tokens: int
    by_priority: dict[int, int]


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One worker. The row columns have one entry per running request, in the order in which they are served."""

    worker_id: int
    model: str
    digest: bytes
    draining: bool
    num_rows: int
    rows: Int64Array
    handles: Int64Array
    router_ids: Int64Array
    num_tokens: Int64Array
    num_computed: Int64Array
    num_confirmed: Int64Array
    num_blocks: Int64Array
    num_prompt: Int64Array
    priority: Int64Array
    block_tables: tuple[Int32Array, ...]
    """The blocks that each row owns, int32 [num_blocks]."""
    block_size: int
    free_blocks: int
    used_blocks: int
    cached_blocks: int
    ref_count: Int32Array
    """int32 [num_blocks of the pool]."""
    next_step_id: int
    in_flight: tuple[int, ...]
    """step_ids without a result."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole scheduler."""

    queues: tuple[QueueSnapshot, ...]
    workers: tuple[WorkerSnapshot, ...]
    num_parked: int
    """Requests that wait for plans in flight to come back."""


def take_load(state: SchedulerState) -> Load:
    """O(workers + models)."""
    workers = state.workers.values()
    total = sum(worker.spec.num_blocks for worker in workers)
    used = sum(worker.pool.num_used for worker in workers)
    return Load(
        waiting=sum(queue.num_requests for queue in state.queues.values()),
        running=len(state.row_of),
        workers=len(workers),
        kv_used=used / total if total else 0.0,
    )


def take_snapshot(state: SchedulerState) -> Snapshot:
    """A copy; nothing in it changes afterwards."""
    queues = tuple(
        QueueSnapshot(digest, queue.num_requests, queue.num_tokens, queue.num_by_priority())
        for digest, queue in state.queues.items()
    )
    workers = tuple(_snapshot_worker(worker) for worker in state.workers.values())
    live = sum(len(handles) for handles in state.requests.values())
    waiting = sum(queue.num_requests for queue in queues)
    return Snapshot(queues, workers, live - waiting - len(state.row_of))


def _snapshot_worker(worker: WorkerState) -> WorkerSnapshot:
    rows, order = worker.rows, worker.rows.order()
    return WorkerSnapshot(
        worker_id=worker.worker_id,
        model=worker.spec.model,
        digest=worker.spec.model_digest,
        draining=worker.draining,
        num_rows=worker.spec.max_rows,
        rows=order.copy(),
        handles=rows.handle[order],
        router_ids=rows.router_id[order],
        num_tokens=rows.num_tokens[order],
        num_computed=rows.num_computed[order],
        num_confirmed=rows.num_confirmed[order],
        num_blocks=rows.num_blocks[order] - rows.first_block[order],
        num_prompt=rows.num_prompt[order],
        priority=np.array([_priority(rows.requests[row]) for row in order.tolist()], np.int64),
        block_tables=tuple(rows.owned_blocks(row).astype(np.int32) for row in order.tolist()),
        block_size=worker.spec.block_size,
        free_blocks=worker.pool.num_free,
        used_blocks=worker.pool.num_used,
        cached_blocks=worker.pool.num_cached,
        ref_count=worker.pool.ref_count.copy(),
        next_step_id=worker.next_step_id,
        in_flight=tuple(plan.step_id for plan in worker.in_flight),
    )


def _priority(request: Request | None) -> int:
    return 0 if request is None else request.priority
