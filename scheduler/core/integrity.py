"""Check that the books balance: what must hold between any two calls, whatever happened before."""

from __future__ import annotations

import numpy as np

from scheduler.core.request import RequestState
from scheduler.core.state import SchedulerState, WorkerState


def check_integrity(state: SchedulerState) -> None:
    """Raises RuntimeError that says which books don't balance."""
    for worker in state.workers.values():
        _check_worker(worker)
    _check_requests(state)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _check_worker(worker: WorkerState) -> None:
    rows, spec, pool = worker.rows, worker.spec, worker.pool
    name = f"worker {worker.worker_id}"
    pool.check_integrity()
    occupied = [row for row, request in enumerate(rows.requests) if request is not None]
    order = rows.order()
    _require(sorted(order.tolist()) == occupied, f"{name}: order and rows differ")
    _require(len(occupied) + rows.num_free == spec.max_rows, f"{name}: rows are lost")

    owners = np.zeros(spec.num_blocks, np.int32)
    for row in occupied:
        blocks = rows.owned_blocks(row)
        _require(np.unique(blocks).size == blocks.size, f"{name}: row {row} owns a block twice")
        owners[blocks] += 1
    _require(np.array_equal(owners, pool.ref_count), f"{name}: ref_count differs from owners")

    tokens, computed, confirmed = rows.num_tokens[order], rows.num_computed[order], rows.num_confirmed[order]
    _require(bool((computed <= tokens).all()), f"{name}: computed more than there is")
    _require(bool((confirmed <= tokens).all()), f"{name}: confirmed more than was promised")
    _require(bool((tokens <= rows.limit[order]).all()), f"{name}: promised beyond the limit")
    needed = -(-computed // spec.block_size)
    _require(bool((rows.num_blocks[order] >= needed).all()), f"{name}: computed tokens without a block")

    _require(
        np.array_equal(rows.capacity[order], rows.num_blocks[order] * spec.block_size), f"{name}: capacity is wrong"
    )
    want = np.minimum(rows.num_tokens, rows.last) - rows.num_computed
    _require(np.count_nonzero(want) == np.count_nonzero(want[order]), f"{name}: a free row wants tokens")
    if worker.lineup is not None and worker.lineup.holds(rows):
        _require(np.array_equal(want, worker.lineup.is_member), f"{name}: other rows decode than are lined up")

    steps = [plan.step_id for plan in worker.in_flight]
    _require(len(steps) <= spec.run_ahead, f"{name}: too many plans in flight")
    _require(steps == list(range(worker.next_step_id - len(steps), worker.next_step_id)), f"{name}: step_id gap")
    promised = np.zeros(spec.max_rows, np.int64)
    for plan in worker.in_flight:
        if not plan.void:
            sampled = plan.rows[plan.samples]
            live = rows.generation[sampled] == plan.generation[plan.samples]
            promised[sampled[live]] += 1
    _require(np.array_equal(tokens - confirmed, promised[order]), f"{name}: promises and plans in flight differ")


def _check_requests(state: SchedulerState) -> None:
    live = {request.key: request for handles in state.requests.values() for request in handles.values()}
    waiting = {request.key for queue in state.queues.values() for request in queue}
    running = {r.key for w in state.workers.values() for r in w.rows.requests if r is not None}
    plans = [plan for worker in state.workers.values() for plan in worker.in_flight]
    parked = {r.key for plan in plans for r in plan.parked if r.state is RequestState.PARKED}
    parked |= {r.key for _, _, r in state.delayed if r.state is RequestState.PARKED}
    _require(waiting | running | parked == live.keys(), "a request is lost, or outlives its end")
    _require(len(waiting) + len(running) + len(parked) == len(live), "a request is in two places")
    for keys, expected in (
        (waiting, RequestState.WAITING),
        (running, RequestState.RUNNING),
        (parked, RequestState.PARKED),
    ):
        _require(all(live[key].state is expected for key in keys), f"a request that is {expected.name} says otherwise")
    for digest, queue in state.queues.items():
        requests = list(queue)
        _require(len(requests) == queue.num_requests, "the queue's count is wrong")
        under_grammar = sum(request.under_grammar for request in requests)
        _require(under_grammar == queue.num_under_grammar, "the queue's count of requests under grammars is wrong")
        _require(sum(r.queue_size for r in requests) == queue.num_tokens, "the queue's token count is wrong")
        _require(all(r.digest == digest for r in requests), "a request waits for another model")
    _require(state.row_of.keys() == running, "row_of differs from the rows")
    _require(all(w.rows.requests[row] is live[key] for key, (w, row) in state.row_of.items()), "row_of is wrong")
    left = {key for plan in plans for key in plan.left}
    _require(state.named_in.keys() <= left, "a plan that came back is still waited for")
