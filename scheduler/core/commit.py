"""Write a composed step into the books and turn it into columns: the end of planner.plan_step."""

from __future__ import annotations

import numpy as np

from scheduler.core.batch import EMPTY, Batch
from scheduler.core.lineup import Lineup, line_up
from scheduler.core.plan import StepPlan
from scheduler.core.request import Int32Array
from scheduler.core.state import InFlightPlan, SchedulerState, WorkerState

EMPTY_INT32 = np.empty(0, np.int32)


def commit(state: SchedulerState, worker: WorkerState, batch: Batch) -> StepPlan:
    """The step is made: what it computes counts as computed from now on."""
    rows = worker.rows
    if batch.lineup is not None and not batch.new_rows:
        return commit_lineup(state, worker, batch, batch.lineup)
    chunk_lens, chunk_token_ids = known_tokens_to_send(worker, batch)
    running, step_rows, counts = batch.rows, batch.rows, batch.counts
    if batch.new_rows:
        step_rows = np.concatenate((step_rows, np.array([new.row for new in batch.new_rows], np.int64)))
        counts = np.concatenate((counts, np.array(batch.new_counts, np.int64)))

    computed = rows.num_computed[step_rows] + counts
    known = rows.num_tokens[step_rows]
    samples = computed == known
    rows.num_computed[step_rows] = computed
    rows.num_tokens[step_rows] = known + samples
    rows.last_step[step_rows] = worker.next_step_id
    for block_hash, block in batch.completes.items():
        worker.pool.register(block, block_hash)

    silent = (rows.prompt_logprobs[step_rows] & ~samples).nonzero()[0] if rows.num_prompt_logprobs else EMPTY
    sampling = samples.nonzero()[0]
    worker.in_flight.append(InFlightPlan(worker.next_step_id, step_rows, sampling, rows.generation[step_rows], silent))
    worker.lineup = None
    if 0 < sampling.size == batch.num_tokens and not state.suspects:
        # No row that wants more than a token is left out: the budget has a token for every row, and it would have got what is left.
        # Of rows that stay together for a second step: where they come and go all the time it would cost more than it saves.
        if worker.lined_up_at == rows.version:
            worker.lineup = line_up(rows, step_rows)
        worker.lined_up_at = rows.version
    return StepPlan(
        step_id=count_step(state, worker, batch),
        new_rows=batch.new_rows,
        freed_rows=take_freed_rows(worker),
        rows=step_rows.astype(np.int32),
        num_scheduled=counts.astype(np.int32),
        num_samples=samples.view(np.uint8),
        append_rows=batch.append_rows.astype(np.int32),
        append_block_ids=batch.append_blocks.astype(np.int32),
        chunk_rows=running[batch.chunks].astype(np.int32),
        chunk_lens=chunk_lens,
        chunk_token_ids=chunk_token_ids,
    )


def commit_lineup(state: SchedulerState, worker: WorkerState, batch: Batch, lineup: Lineup) -> StepPlan:
    """The same for one more step of the same rows."""
    rows, step_id = worker.rows, worker.next_step_id
    rows.num_computed += lineup.is_member
    rows.num_tokens += lineup.is_member
    rows.last_step[lineup.rows] = step_id
    lineup.steps_left -= 1
    worker.in_flight.append(InFlightPlan(step_id, lineup.rows, lineup.places, lineup.generation, EMPTY, lineup=lineup))
    return StepPlan(
        step_id=count_step(state, worker, batch),
        new_rows=[],
        freed_rows=take_freed_rows(worker),
        rows=lineup.rows32,
        num_scheduled=lineup.ones32,
        num_samples=lineup.ones8,
        append_rows=batch.append_rows.astype(np.int32),
        append_block_ids=batch.append_blocks.astype(np.int32),
        chunk_rows=EMPTY_INT32,
        chunk_lens=EMPTY_INT32,
        chunk_token_ids=EMPTY_INT32,
    )


def count_step(state: SchedulerState, worker: WorkerState, batch: Batch) -> int:
    """The step's number; the next one has the next."""
    state.counters.steps += 1
    state.counters.scheduled_tokens += batch.num_tokens
    worker.next_step_id += 1
    return worker.next_step_id - 1


def take_freed_rows(worker: WorkerState) -> Int32Array:
    """Rows that were freed since the last plan, int32 [F]."""
    if not worker.freed_rows:
        return EMPTY_INT32
    freed, worker.freed_rows = np.array(worker.freed_rows, np.int32), []
    return freed


def known_tokens_to_send(worker: WorkerState, batch: Batch) -> tuple[Int32Array, Int32Array]:
    """Lengths, int32 [C], and ids, int32 [sum], of the known tokens in running rows' chunks. A new row brings its own."""
    if batch.chunks.size == 0:
        return EMPTY_INT32, EMPTY_INT32
    rows = worker.rows
    chunk_rows = batch.rows[batch.chunks]
    start = rows.num_computed[chunk_rows]
    lens = np.minimum(batch.counts[batch.chunks], rows.num_initial[chunk_rows] - start)
    pieces = [
        rows.tokens[row, begin : begin + length]
        for row, begin, length in zip(chunk_rows.tolist(), start.tolist(), lens.tolist(), strict=True)
    ]
    return lens.astype(np.int32), np.concatenate(pieces)
