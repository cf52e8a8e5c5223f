"""Priorities that preempt: a waiting request takes the place of running ones of strictly lower priority.

It does so only where no worker has room for it, and only where it then has room: nobody is preempted in vain. Victims are the lowest
priority first, and of these the latest, so that whoever has got furthest stays. They go back to the head of their class with
their tokens. As only a strictly higher priority preempts, no two requests can take turns.
"""

from __future__ import annotations

import numpy as np

from scheduler.core.batch import Batch
from scheduler.core.placement import Placement, blocks_to_read, can_run, find_prefix, next_block_is_coming, place_on
from scheduler.core.request import Request
from scheduler.core.state import SchedulerState, WorkerState
from scheduler.core.waiting import WaitingQueue


def outranks(queue: WaitingQueue, worker: WorkerState) -> bool:
    """Whether a request waits that is more important than one that runs on this worker. O(1)."""
    waiting, running = queue.highest_priority(), worker.rows.lowest_priority()
    return waiting is not None and running is not None and waiting > running


def place_by_preemption(state: SchedulerState, worker: WorkerState, request: Request, batch: Batch) -> Placement | None:
    """Makes room for a request that no worker has room for; returns its place.

    None where the worker can't make room, or where another one could at the expense of a lower priority: that one's next plan will.
    """
    if request.suspicion or batch.suspicion or batch.num_preempting >= state.settings.max_preempting:
        return None
    victims = find_victims(state, worker, request)
    if not victims:
        return None
    lowest = worker.rows.lowest_priority()
    for other in state.workers_of[request.digest]:
        priority = other.rows.lowest_priority()
        if priority is not None and lowest is not None and priority < lowest and find_victims(state, other, request):
            return None
    chain, num_hits = find_prefix(state, worker, request, request.known_token_ids())
    if next_block_is_coming(request, chain, num_hits, worker.spec.block_size, batch.completes):
        return None
    for row in victims:
        batch.drop(row, worker.rows)
        batch.victim_priority = state.preempt(worker, row).priority  # ascending: the lowest go first
    state.counters.priority_preemptions += len(victims)
    batch.num_preempting += 1
    return place_on(state, worker, request, request.known_token_ids())


def find_victims(state: SchedulerState, worker: WorkerState, request: Request) -> list[int]:
    """The rows, last in order first, that must go so that the worker has room for the request; empty if it can't be made."""
    spec, rows, pool = worker.spec, worker.rows, worker.pool
    if worker.draining or not can_run(spec, request):
        return []
    chain, num_hits = find_prefix(state, worker, request, request.known_token_ids())
    hits = blocks_to_read(worker, chain, num_hits)
    needed = spec.num_blocks_for(request.num_known_tokens) - len(hits)
    watermark = int(state.settings.watermark * spec.num_blocks)
    outranked = rows.less_important_than(request.priority)
    owned = int((rows.num_blocks[outranked] - rows.first_block[outranked]).sum())
    if needed > pool.num_available + owned:
        return []  # soon told, for it may be so in each plan of a long time
    # As has_room() will find it once they are gone: blocks that only victims own become available, hits among them not.
    owners = pool.ref_count.copy()
    available = pool.num_available
    victims: list[int] = []
    for row in outranked[::-1].tolist():
        victims.append(row)
        blocks = rows.owned_blocks(row)
        owners[blocks] -= 1
        available += int(np.count_nonzero(owners[blocks] == 0))
        spare = watermark if len(victims) < rows.num_running else 0
        if needed + int(np.count_nonzero(owners[hits] == 0)) + spare <= available:
            return victims
    return []
