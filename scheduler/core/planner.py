"""Plan one step for one worker. Start reading at `plan_step`.

One budget, no phases (the idea of vLLM V1's scheduler): every row has some tokens and has computed some of them, and
each step hands out tokens of the budget so that computed catches up. Decode (one token behind), chunked prefill (many
behind), a prefix hit (computed starts above 0) and resumption after preemption (tokens include outputs) are all this
same arithmetic.
"""

from __future__ import annotations

import numpy as np

from scheduler.core.batch import Batch
from scheduler.core.commit import commit
from scheduler.core.errors import Reason
from scheduler.core.placement import Placement, can_run, find_placement, limit_on, next_block_is_coming
from scheduler.core.plan import DEAD_BLOCK, Admitted, Int64Array, NewRow, StepPlan
from scheduler.core.preemption import outranks, place_by_preemption
from scheduler.core.request import Request, RequestState
from scheduler.core.rows import Rows
from scheduler.core.settings import WorkerSpec
from scheduler.core.state import SchedulerState, WorkerState
from scheduler.core.waiting import WaitingQueue

ONE = np.ones(1, np.int64)
GAP_SMOOTHING = 0.1
CHARGE_EVERY = 4
"""Steps in which the tenants of running requests are charged at most once: somebody may be admitted in each of them."""
MAX_EXTRA_BYTES = 8 << 20
"""Of grammars in one plan, unless a single one is larger: a plan is one message, and 256 of the largest would fit into none."""
LOOK_PAST = 256
LOOK_FAR_EVERY = 16
"""A worker that runs something looks past more than LOOK_PAST requests that it can't run only once in so many steps: 3 µs each."""


def plan_step(state: SchedulerState, worker: WorkerState, now: float) -> StepPlan | None:
    """The next step of a worker, or None if its pipeline is full or there is nothing to do.

    Running rows come first and take the blocks they need, preempting the least important ones if there are too few. Then waiting
    requests get what is left of the budget, or the place of running ones of lower priority. Rows freed since the last plan go out
    with this one, if need be alone.
    """
    if len(worker.in_flight) >= worker.spec.run_ahead:
        return None
    suspicion = suspects_to_try(state, worker) if state.suspects else 0
    if suspicion and worker.in_flight:
        return None  # their step goes alone, so that a failure can only be theirs
    batch = Batch(suspicion=suspicion)
    if worker.rows.num_running:
        release_blocks_behind_window(worker)
        schedule_running(state, worker, batch)
        find_completed_blocks(worker, batch)
    if not batch.preempted:
        admit_waiting(state, worker, batch, now)
    if batch.rows.size == 0 and not batch.new_rows and not worker.freed_rows:
        return None
    return commit(state, worker, batch)


def suspects_to_try(state: SchedulerState, worker: WorkerState) -> int:
    """The group of suspects whose turn it is on this worker: one that runs here, or one that leads the queue and belongs here."""
    for key, request in state.suspects.items():
        if state.row_of.get(key, (None,))[0] is worker:
            return request.suspicion
    queue = state.queues.get(worker.spec.model_digest)
    first = queue.pop() if queue is not None and worker.rows.num_free else None
    if queue is None or first is None:
        return 0
    placement = find_placement(state, first) if first.suspicion else None
    queue.put_back([first])
    return first.suspicion if placement is not None and placement.worker is worker else 0


# Running -----------------------------------------------------------------------------------------------------------------


def schedule_running(state: SchedulerState, worker: WorkerState, batch: Batch) -> None:
    """Chooses running rows and gives them blocks. Preempts the last in order until the blocks of the others suffice.

    This ends: one row alone always fits, or placement.fits() had kept it out.
    """
    rows, spec = worker.rows, worker.spec
    lineup = worker.lineup
    if lineup is not None and lineup.holds(rows) and not state.suspects:
        full = rows.num_computed == rows.capacity
        full &= lineup.is_member
        growing = full.nonzero()[0]
        if growing.size <= worker.pool.num_available:
            batch.rows, batch.counts, batch.num_tokens, batch.lineup = (
                lineup.rows,
                lineup.ones,
                lineup.rows.size,
                lineup,
            )
            if growing.size:
                batch.append_blocks = worker.pool.allocate(growing.size)
                batch.append_rows = rows.append_blocks(growing, ONE, batch.append_blocks)
            return
    while True:
        order, num_running = rows.order(), rows.num_running
        if state.suspects:
            order = of_one_group(rows, order, batch.suspicion)
            num_running = order.size
        # All known tokens, but never the last one that the limit allows: it is sampled, and nobody reads its keys.
        want = np.minimum(rows.num_tokens, rows.last)
        want -= rows.num_computed
        if num_running < rows.num_running:
            mine, want = want[order], np.zeros_like(want)
            want[order] = mine
        chosen, counts = share_budget(want, order, step_budget(state, spec, num_running))
        num_tokens = int(counts.sum())
        computed = rows.num_computed[chosen]
        missing = computed + counts - rows.capacity[chosen]
        growing = (missing > 0).nonzero()[0]
        if num_tokens == chosen.size:  # one token each, so one block each at most
            needed, num_needed = ONE, growing.size
        else:
            needed = -(-missing[growing] // spec.block_size)
            num_needed = int(needed.sum())
        if num_needed <= worker.pool.num_available:
            break
        state.preempt(worker, int(rows.order()[-1]))
        batch.preempted = True
    batch.rows, batch.counts, batch.num_tokens = chosen, counts, num_tokens
    batch.chunks = (computed < rows.num_initial[chosen]).nonzero()[0]
    if num_needed:
        batch.append_blocks = worker.pool.allocate(num_needed)
        batch.append_rows = rows.append_blocks(chosen[growing], needed, batch.append_blocks)


def step_budget(state: SchedulerState, spec: WorkerSpec, num_rows: int) -> int:
    """Tokens of a step that so many rows share. All of them wait for its end, so it is short; a prompt alone may have a long one."""
    if num_rows <= 1:
        return spec.max_num_batched_tokens
    # Never so few that decodes leave nothing for prompts.
    return min(spec.max_num_batched_tokens, max(state.settings.max_shared_tokens, 2 * spec.max_rows))


def of_one_group(rows: Rows, order: Int64Array, suspicion: int) -> Int64Array:
    """The rows of `order` whose requests are under this suspicion; those of others wait for a step of their own."""
    kept = [row for row in order.tolist() if (request := rows.requests[row]) and request.suspicion == suspicion]
    return np.array(kept, np.int64)


def share_budget(want: Int64Array, order: Int64Array, budget: int) -> tuple[Int64Array, Int64Array]:
    """The rows that compute, int64 [R], and how many tokens each, int64 [R], given what each row wants, int64 [max_rows].

    Rows that want one token come first, so that a long prefill never stalls a decode; there are at most max_rows of them, which
    the budget always holds. The rest is dealt out in `order`, of importance: the row in which it runs out gets a part.
    """
    singles = (want == 1).nonzero()[0]
    if singles.size == np.count_nonzero(want):
        return singles, want[singles]
    chunked = order[want[order] > 1]
    chunks = want[chunked]
    left = budget - singles.size - (chunks.cumsum() - chunks)
    served = left > 0
    counts = np.minimum(left, chunks)[served]
    return np.concatenate((singles, chunked[served])), np.concatenate((want[singles], counts))


def release_blocks_behind_window(worker: WorkerState) -> None:
    """Gives back blocks that the next position of their row doesn't read any more. Their content can still be hit."""
    spec, rows = worker.spec, worker.rows
    if spec.window is None:
        return
    order = rows.order()
    first_live = np.maximum(rows.num_computed[order] - (spec.window - 1), 0) // spec.block_size
    # A row that has computed nothing since it was placed may own no block yet.
    first_live = np.minimum(first_live, rows.num_blocks[order])
    for index in (first_live > rows.first_block[order]).nonzero()[0].tolist():
        row, first = order[index], int(first_live[index])
        worker.pool.release(rows.block_table[row, rows.first_block[row] : first].astype(np.int64))
        rows.first_block[row] = first


def find_completed_blocks(worker: WorkerState, batch: Batch) -> None:
    """Notes the blocks of known tokens that running rows fill in this step."""
    for index in batch.chunks.tolist():
        row, count = int(batch.rows[index]), int(batch.counts[index])
        note_completed_blocks(worker, batch, row, count)


def note_completed_blocks(worker: WorkerState, batch: Batch, row: int, count: int) -> None:
    """Notes the blocks that `count` more known tokens of one row fill."""
    rows, size = worker.rows, worker.spec.block_size
    computed = int(rows.num_computed[row])
    first, end = computed // size, min(computed + count, int(rows.num_initial[row])) // size
    chain = rows.chains[row]
    if end > first and chain is not None:
        names = chain.extend(rows.tokens[row], end)[first:end]
        for name, block in zip(names, rows.block_table[row, first:end].tolist(), strict=True):
            batch.completes.setdefault(name, block)


# Waiting -----------------------------------------------------------------------------------------------------------------


def admit_waiting(state: SchedulerState, worker: WorkerState, batch: Batch, now: float) -> None:
    """Gives waiting requests the rest of the budget, in the queue's order.

    A request is passed over, and those behind it may go, if another worker is the better place for it or if the block that it
    needs next is being computed by this very plan: a later plan will find it cached. A request that no worker has room for stops
    the search, unless it may take the place of others: nobody overtakes it, so that it can't starve. At most max_candidates are
    passed over. Requests that this worker could never run, idle or not, take nothing from those behind them: they neither stop the
    search nor count.

    A group of suspects stays together where its first request was placed: each step that is theirs alone holds all others up.
    """
    queue = state.queues.get(worker.spec.model_digest)
    if queue is None or queue.num_requests == 0 or worker.draining:
        return
    if worker.rows.num_free == 0 and not outranks(queue, worker):
        return
    if worker.next_step_id >= worker.charge_from_step and queue.has_rivals():
        worker.charge_from_step = worker.next_step_id + CHARGE_EVERY
        for running, num_tokens in worker.rows.take_uncharged():
            queue.charge(running, num_tokens)
    passed_over: list[Request] = []
    max_candidates = state.settings.max_candidates + (len(state.suspects) if batch.suspicion else 0)
    num_for_others = 0
    while len(passed_over) - num_for_others < max_candidates:
        if budget_for_one_more(state, worker, batch) <= 0:
            break
        if worker.rows.num_free == 0 and not outranks(queue, worker):
            break
        request = None if only_others_can_run(state, worker, queue) else queue.pop()
        if request is None:
            break
        if not can_run(worker.spec, request):
            if fail_if_hopeless(state, queue, request):
                continue
            passed_over.append(request)
            num_for_others += 1
            if num_for_others == LOOK_PAST and worker.rows.num_running:
                if worker.next_step_id < worker.look_far_from_step:
                    break
                worker.look_far_from_step = worker.next_step_id + LOOK_FAR_EVERY
            continue
        if request.suspicion != batch.suspicion:
            passed_over.append(request)
            if batch.suspicion:
                continue
            break  # it waits for a step of its own, and nobody overtakes it
        if batch.victim_priority is not None and request.priority <= batch.victim_priority:
            passed_over.append(request)
            break  # who has just lost its place must not take what is left of it
        if batch.extra_bytes and batch.extra_bytes + request.extra_bytes > MAX_EXTRA_BYTES:
            passed_over.append(request)
            break  # the next plan has room
        placement = find_placement(state, request, worker if batch.suspicion else None)
        if placement is None:
            placement = place_by_preemption(state, worker, request, batch)
        if placement is None:
            passed_over.append(request)
            break
        chain, hits, size = placement.chain, placement.num_hits, placement.worker.spec.block_size
        if placement.worker is not worker or next_block_is_coming(request, chain, hits, size, batch.completes):
            passed_over.append(request)
            continue
        admit(state, placement, request, batch, now)
        batch.extra_bytes += request.extra_bytes
    queue.put_back(passed_over)


def budget_for_one_more(state: SchedulerState, worker: WorkerState, batch: Batch) -> int:
    """Tokens that a newcomer may compute in this step; none where it is not above 0."""
    return step_budget(state, worker.spec, batch.num_rows + 1) - batch.num_tokens


def only_others_can_run(state: SchedulerState, worker: WorkerState, queue: WaitingQueue) -> bool:
    """Whether all that wait are under grammars, which others of the model follow and this worker doesn't. O(workers)."""
    if worker.spec.grammars or queue.num_under_grammar < queue.num_requests:
        return False
    return any(other.spec.grammars for other in state.workers_of[worker.spec.model_digest])


def fail_if_hopeless(state: SchedulerState, queue: WaitingQueue, request: Request) -> bool:
    """Withdraws a popped request if no worker of the model could ever hold it; whether that was so."""
    if any(can_run(worker.spec, request) for worker in state.workers_of[request.digest]):
        return False
    queue.push(request)  # so that failing it finds it where its state says
    state.fail(request, *why_hopeless(state, request))
    return True


def why_hopeless(state: SchedulerState, request: Request) -> tuple[Reason, str]:
    """What its router is told of a hopeless request."""
    specs = [worker.spec for worker in state.workers_of[request.digest]]
    if request.under_grammar and not any(spec.grammars for spec in specs):
        return Reason.UNSUPPORTED, "no worker that is left decodes under a grammar"
    return Reason.PROMPT_TOO_LONG, "no worker that is left can hold the request"


def admit(state: SchedulerState, placement: Placement, request: Request, batch: Batch, now: float) -> None:
    """Gives a request a row, its cached blocks and its first chunk."""
    worker, num_hits, hits = placement.worker, placement.num_hits, placement.hits
    spec, rows, pool = worker.spec, worker.rows, worker.pool
    request.limit = limit_on(spec, request)
    num_cached = num_hits * spec.block_size
    row = rows.occupy(request, placement.chain if state.settings.prefix_caching else None, num_cached)
    state.row_of[request.key] = (worker, row)
    request.state = RequestState.RUNNING

    # Blocks: dead ones behind the window, then hits, then new ones.
    first = spec.first_live_block(num_cached)
    pool.touch(hits)
    count = min(request.num_known_tokens - num_cached, budget_for_one_more(state, worker, batch))
    # Placement looked for room for all known tokens; only the first chunk's blocks are taken. Others may take the rest meanwhile:
    # then whoever is last in order is preempted, which costs less than to keep blocks idle.
    num_blocks = -(-(num_cached + count) // spec.block_size)
    block_ids = np.empty(num_blocks, np.int32)
    block_ids[:first] = DEAD_BLOCK
    block_ids[first:num_hits] = hits
    block_ids[num_hits:] = pool.allocate(num_blocks - num_hits)
    rows.set_blocks(row, first, block_ids)

    batch.new_rows.append(
        NewRow(
            row=row,
            request=request,
            token_ids=rows.tokens[row, : num_cached + count].copy(),
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed=num_cached,
            block_ids=block_ids,
        )
    )
    batch.new_counts.append(count)
    batch.num_tokens += count
    note_completed_blocks(worker, batch, row, count)
    count_admission(state, request, num_cached, now)


def count_admission(state: SchedulerState, request: Request, num_cached: int, now: float) -> None:
    """Books, and news for the router of its request. One that only waited for its grammar has been admitted before."""
    if request.lost_at is not None:
        state.recoveries.append(now - request.lost_at)
        request.lost_at = None
    if request.was_late:
        request.was_late = False
        return
    counters = state.counters
    counters.admitted += 1
    if request.reads_prefix_cache:
        counters.prefix_queries += request.num_known_tokens
        counters.prefix_hits += num_cached
    if not request.was_admitted:
        request.was_admitted = True
        # Of newcomers only: who comes back from a row doesn't move the queue.
        state.admission_gap += GAP_SMOOTHING * (now - state.queue_moved_at - state.admission_gap)
        state.queue_moved_at = now
        state.queues[request.digest].charge(request, request.num_prompt_tokens)
    waited = max(0.0, now - request.submitted)
    state.admitted.append(Admitted(request.router_id, request.handle, num_cached, request.digest, waited))
