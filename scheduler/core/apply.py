"""Apply the result of one step: confirm tokens, finish requests, tell routers. Start reading at `apply_result`."""

from __future__ import annotations

import numpy as np

from scheduler.core.errors import InvalidResult
from scheduler.core.lineup import Sampled, look_up
from scheduler.core.plan import BoolArray, Int64Array, RowStatus, StepResult, TokenColumns, UInt8Array
from scheduler.core.prefix import block_bytes, num_block_bytes
from scheduler.core.request import FinishReason, Int32Array
from scheduler.core.state import InFlightPlan, SchedulerState, WorkerState, still_there


def apply_result(state: SchedulerState, worker: WorkerState, result: StepResult, now: float) -> list[TokenColumns]:
    """Books the result of the oldest plan in flight and returns the events of each router.

    Entries are read by position against the kept plan. Those of rows that were freed since (a stop token seen late, a cancel, a
    preemption) are dropped. Raises InvalidResult, with nothing changed, if the result doesn't answer that plan.
    """
    plan = worker.in_flight[0] if worker.in_flight else None
    if plan is None or result.step_id != plan.step_id:
        expected = plan.step_id if plan else "none"
        raise InvalidResult(f"step_id {result.step_id} came, expected {expected}")
    if not result.ok:
        fail_step(state, worker, now)
        return []
    token_ids, status = check_columns(plan, result)
    events = confirm_tokens(state, worker, plan, token_ids, status, now)
    worker.in_flight.popleft()
    state.close_plan(plan)
    if state.suspects:
        state.clear_suspects(worker)
    return events


def fail_step(state: SchedulerState, worker: WorkerState, now: float) -> None:
    """A failed step voids the plans after it. All requests on the worker are recomputed.

    When those plans fail too, nothing is left to do: requests planned since come later on the device's stream. When one of them
    succeeds nevertheless, its entries are dropped like those of any row that was freed.
    """
    if not worker.in_flight[0].void:
        state.counters.failed_steps += 1
        state.evacuate(worker, now, step_failed=True)
    state.close_plan(worker.in_flight.popleft())


def check_columns(
    plan: InFlightPlan, result: StepResult
) -> tuple[Int32Array, np.ndarray[tuple[int], np.dtype[np.integer]] | None]:
    """Token ids, int32 [S] with -1 where a row failed, and statuses, [S], or None if all are OK. Raises InvalidResult."""
    num_samples = plan.samples.size
    token_ids, num_tokens, status = result.token_ids, result.num_tokens, result.row_status
    if num_tokens.shape != (num_samples,):
        raise InvalidResult(f"num_tokens has shape {num_tokens.shape}, expected ({num_samples},)")
    if status is not None and status.size == 0:
        status = None
    if status is None:
        num_expected = num_samples
        is_right = np.count_nonzero(num_tokens == 1) == num_samples
    else:
        if status.shape != (num_samples,):
            raise InvalidResult(f"row_status has shape {status.shape}, expected ({num_samples},)")
        if num_samples and int(status.max()) > max(RowStatus):
            raise InvalidResult("row_status holds an unknown number")
        good = status == RowStatus.OK
        num_expected = int(np.count_nonzero(good))
        is_right = np.array_equal(num_tokens, good)
    if not is_right:
        raise InvalidResult("num_tokens must be 1 for each row whose status is OK, and 0 for others")
    if token_ids.shape != (num_expected,):
        raise InvalidResult(f"token_ids has shape {token_ids.shape}, num_tokens says ({num_expected},)")
    if token_ids.size and int(token_ids.min()) < 0:
        raise InvalidResult("token_ids holds a negative id")
    if status is None or num_expected == num_samples:
        return token_ids, None
    spread = np.full(num_samples, -1, np.int32)
    spread[good] = token_ids
    return spread, status


def confirm_tokens(
    state: SchedulerState,
    worker: WorkerState,
    plan: InFlightPlan,
    token_ids: Int32Array,
    status: np.ndarray[tuple[int], np.dtype[np.integer]] | None,
    now: float,
) -> list[TokenColumns]:
    """Appends the sampled tokens to their rows, ends those that are done, and registers the blocks that were filled."""
    rows = worker.rows
    index, silent = plan.samples, plan.silent
    if plan.lineup is not None and plan.lineup.version == rows.version:
        sampled = plan.lineup.sampled
    else:
        alive = still_there(worker, plan)
        if np.count_nonzero(alive) < alive.size:
            keep = alive[index]
            state.counters.discarded_tokens += int((token_ids[~keep] >= 0).sum())
            index, token_ids, silent = index[keep], token_ids[keep], silent[alive[silent]]
            status = None if status is None else status[keep]
        sampled = look_up(rows, plan.rows[index])
    row = sampled.rows
    position = rows.num_confirmed[row]
    good: BoolArray | None = None
    if status is not None:
        good = status == RowStatus.OK
        rows.tokens[row[good], position[good]] = token_ids[good]
        confirmed = position + good
    else:
        rows.tokens[row, position] = token_ids
        confirmed = position + 1
    rows.num_confirmed[row] = confirmed
    finish = finish_reasons(sampled, token_ids, confirmed, good)
    late = None if status is None else status == RowStatus.MASK_LATE
    if late is not None:
        finish[late] = FinishReason.NONE
    events = make_events(worker, plan, sampled, index, silent, position, token_ids, finish, good)
    state.counters.output_tokens += row.size if good is None else int(good.sum())

    register_sampled_blocks(worker, row, confirmed, good)
    for ended in finish.nonzero()[0].tolist():
        failed_by = RowStatus.OK if status is None else RowStatus(int(status[ended]))
        end_row(state, worker, int(row[ended]), FinishReason(int(finish[ended])), failed_by)
    if late is not None:
        for row_without_mask in row[late].tolist():
            state.delay(worker, row_without_mask, now)
    return events


def finish_reasons(
    sampled: Sampled, token_ids: Int32Array, confirmed: Int64Array, good: BoolArray | None
) -> UInt8Array:
    """uint8 [S] of FinishReason. A stop token counts only from min_tokens on, and before the length does."""
    finish = np.zeros(confirmed.size, np.uint8)
    finish[confirmed >= sampled.limit] = FinishReason.LENGTH
    is_stop = sampled.stop_token_ids == token_ids
    if np.count_nonzero(is_stop):  # rare, and any() along an axis is slow
        finish[is_stop.any(axis=0) & (confirmed >= sampled.min_total)] = FinishReason.STOP
    if good is not None:
        finish[~good] = FinishReason.ERROR
    return finish


def end_row(state: SchedulerState, worker: WorkerState, row: int, reason: FinishReason, status: RowStatus) -> None:
    """The request is done; its row and blocks are free. What a row with NaNs has written is never hit again."""
    chain = worker.rows.chains[row]
    if status is RowStatus.NAN and chain is not None:
        blocks = [block for name in chain.hashes if (block := worker.pool.lookup(name)) is not None]
        worker.pool.unregister(blocks)  # by name, so that blocks behind a sliding window are among them
    state.finish(state.leave_row(worker, row))
    state.counters.finished[reason] += 1


def register_sampled_blocks(
    worker: WorkerState, row: Int64Array, confirmed: Int64Array, good: BoolArray | None
) -> None:
    """Makes blocks that end in sampled tokens hittable, one step after their last token was confirmed: then it is computed.

    Blocks of known tokens were registered by the plan that computes them.
    """
    rows, size = worker.rows, worker.spec.block_size
    filled = confirmed > rows.next_full[row]
    if good is not None:
        filled &= good
    owners = row[filled]
    if not owners.size:
        return
    full = rows.next_full[owners]
    rows.next_full[owners] = full + size
    indices = full // size - 1
    if worker.spec.window is not None:  # a block that is behind it already is the row's no more
        is_owned = indices >= rows.first_block[owners]
        owners, indices = owners[is_owned], indices[is_owned]
    blocks = rows.block_table[owners, indices]
    # Token ids of all these blocks at once: numpy costs by the call.
    content, width = block_bytes(rows.token_blocks[owners, indices]), num_block_bytes(size)
    chains, register = rows.chains, worker.pool.register
    for owner, index, block, begin in zip(
        owners.tolist(), indices.tolist(), blocks.tolist(), range(0, len(content), width), strict=True
    ):
        chain = chains[owner]
        if chain is None:
            continue
        if len(chain.hashes) == index:
            register(block, chain.append(content[begin : begin + width]))
        else:
            register(block, chain.extend(rows.tokens[owner], index + 1)[index])


def make_events(
    worker: WorkerState,
    plan: InFlightPlan,
    sampled: Sampled,
    index: Int64Array,
    silent: Int64Array,
    position: Int64Array,
    token_ids: Int32Array,
    finish: UInt8Array,
    good: BoolArray | None,
) -> list[TokenColumns]:
    """The same entries as columns, one set for each router."""
    lineup = plan.lineup
    if lineup is not None and lineup.sampled is sampled:
        num_tokens, plan_index = lineup.ones32, lineup.places32
    else:
        num_tokens, plan_index = np.ones(index.size, np.int32), index.astype(np.int32)
    if good is not None:
        num_tokens = good.astype(np.int32)
    if silent.size:  # entries without tokens, which only carry prompt log-probabilities
        silent_rows, none = plan.rows[silent], np.zeros(silent.size, np.int64)
        sampled = look_up(worker.rows, np.concatenate((sampled.rows, silent_rows)))
        plan_index = np.concatenate((index, silent)).astype(np.int32)
        position = np.concatenate((position, worker.rows.num_prompt[silent_rows]))
        num_tokens = np.concatenate((num_tokens, none.astype(np.int32)))
        token_ids = np.concatenate((token_ids, none.astype(np.int32) - 1))
        finish = np.concatenate((finish, none.astype(np.uint8)))
    entries = TokenColumns(
        router_id=sampled.router_id or 0,
        handles=sampled.handles,
        first_output_index=(position - sampled.num_prompt).astype(np.int32),
        num_tokens=num_tokens,
        finish_reason=finish,
        token_ids=token_ids,
        plan_index=plan_index,
    )
    return split_by_router(entries, sampled)


def split_by_router(entries: TokenColumns, sampled: Sampled) -> list[TokenColumns]:
    """One TokenColumns for each router. `token_ids` comes in with one slot per entry and leaves flat."""
    router_ids = sampled.router_ids
    if router_ids.size == 0:
        return []
    if sampled.router_id is not None:
        if np.count_nonzero(entries.num_tokens) == router_ids.size:
            return [entries]
        routers, masks = [sampled.router_id], [np.ones(router_ids.size, np.bool_)]
    else:
        routers = np.unique(router_ids).tolist()
        masks = [router_ids == router for router in routers]
    return [
        TokenColumns(
            router_id=router,
            handles=entries.handles[mask],
            first_output_index=entries.first_output_index[mask],
            num_tokens=entries.num_tokens[mask],
            finish_reason=entries.finish_reason[mask],
            token_ids=entries.token_ids[mask & (entries.num_tokens > 0)],
            plan_index=entries.plan_index[mask],
        )
        for router, mask in zip(routers, masks, strict=True)
    ]
