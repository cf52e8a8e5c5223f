"""All that the scheduler remembers, and the moves of a request between waiting, running, parked and gone.

planner.py and apply.py decide *when* a request moves; how its books are kept is here, once.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from scheduler.core.block_pool import BlockPool
from scheduler.core.errors import Reason
from scheduler.core.lineup import Lineup
from scheduler.core.plan import Admitted, BoolArray, Failed, Int64Array
from scheduler.core.request import FinishReason, Request, RequestKey, RequestState
from scheduler.core.rows import Rows
from scheduler.core.settings import Settings, WorkerSpec
from scheduler.core.waiting import WaitingQueue

MASK_DELAY = 0.02
"""Seconds until a request whose grammar was not compiled in time is planned again, doubled each time that it gets no further …"""
MAX_MASK_DELAY = 1.0
"""… up to this."""


@dataclass(slots=True)
class Counters:
    """Totals since the start, for metrics."""

    submitted: int = 0
    refused: int = 0
    admitted: int = 0
    """Rows given to requests, those that come back after a preemption or a loss among them, those after a late mask not."""
    finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))
    failed: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(Reason, 0))
    cancelled: int = 0
    preemptions: int = 0
    """Requests that lost their row to others, for want of blocks or to a higher priority …"""
    priority_preemptions: int = 0
    """… and those of them that lost it to a waiting request of higher priority."""
    recomputed_tokens: int = 0
    """Computed counts that preemptions, failed steps and lost workers threw away."""
    discarded_tokens: int = 0
    """Sampled for a request that had left its row: after a stop token, a cancel or a preemption."""
    prefix_queries: int = 0
    """Known tokens of admitted requests that read the prefix cache …"""
    prefix_hits: int = 0
    """… and how many of them were cached."""
    steps: int = 0
    failed_steps: int = 0
    late_masks: int = 0
    """Times that a request left its row because its grammar was still being compiled."""
    scheduled_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class InFlightPlan:
    """What must be known of a plan to read its result by position."""

    step_id: int
    rows: Int64Array
    """int64 [R]."""
    samples: Int64Array
    """int64 [S]: indices into `rows` of those that sample."""
    generation: Int64Array
    """int64 [R]: whose result it is, by Rows.generation."""
    silent: Int64Array
    """int64: indices into `rows` of chunks whose prompt log-probabilities are due though they don't sample."""
    left: list[RequestKey] = field(default_factory=list)
    """Requests that left their row while this was the last plan in flight that names them …"""
    parked: list[Request] = field(default_factory=list)
    """… and of these the ones that wait for it to come back before they may be planned again."""
    lineup: Lineup | None = None
    """Of a step in which each row computes and samples one token, and the one before it was the same."""
    void: bool = False
    """A step before it failed, so its own failure is no news."""


@dataclass(slots=True, eq=False)
class WorkerState:
    """One worker: its rows, its blocks and its plans in flight."""

    worker_id: int
    spec: WorkerSpec
    rows: Rows
    pool: BlockPool
    incarnation: int
    """Of its process; it may enlist more than once."""
    in_flight: deque[InFlightPlan] = field(default_factory=deque)
    next_step_id: int = 1
    charge_from_step: int = 0
    """From this step on tenants may be charged again for what their rows have made."""
    look_far_from_step: int = 0
    """From this step on the queue may be searched again past many requests that only other workers can run."""
    lineup: Lineup | None = None
    """Of the last plan, where each of its rows computes and samples one token."""
    lined_up_at: int = -1
    """Rows.version of the last plan of that kind."""
    freed_rows: list[int] = field(default_factory=list)
    """Rows to name as freed in the next plan."""
    draining: bool = False

    @classmethod
    def new(cls, worker_id: int, spec: WorkerSpec, incarnation: int) -> WorkerState:
        """A worker that has just enlisted: every row and block is free."""
        return cls(worker_id, spec, Rows(spec), BlockPool(spec.num_blocks), incarnation)

    def plan_that_names(self, row: int) -> InFlightPlan | None:
        """The last plan in flight that names the row."""
        last = int(self.rows.last_step[row])
        if not self.in_flight or last < self.in_flight[0].step_id:
            return None
        return self.in_flight[last - self.in_flight[0].step_id]

    def free_row(self, row: int) -> Request:
        """Takes the request out of its row. Row and blocks may be used again in the next plan: the device runs plans in order."""
        self.pool.release(self.rows.owned_blocks(row))
        self.freed_rows.append(row)
        return self.rows.vacate(row)


@dataclass(slots=True)
class SchedulerState:
    """Everything."""

    settings: Settings
    workers: dict[int, WorkerState] = field(default_factory=dict)
    workers_of: dict[bytes, list[WorkerState]] = field(default_factory=dict)
    """By model digest."""
    queues: dict[bytes, WaitingQueue] = field(default_factory=dict)
    """By model digest. Kept while it holds requests or a worker holds the model."""
    requests: dict[int, dict[int, Request]] = field(default_factory=dict)
    """By router id and handle; every request that isn't finished."""
    models: dict[str, set[bytes]] = field(default_factory=dict)
    """By model name: every digest that a worker has held under it."""
    orphaned_at: dict[bytes, float] = field(default_factory=dict)
    """By model digest without a worker: since when, seconds."""
    admission_gap: float = 0.0
    """Seconds between admissions of newcomers while some wait, smoothed."""
    queue_moved_at: float = 0.0
    """When a newcomer was last admitted, or came to wait where nobody waited."""
    row_of: dict[RequestKey, tuple[WorkerState, int]] = field(default_factory=dict)
    """Where each running request is."""
    delayed: list[tuple[float, int, Request]] = field(default_factory=list)
    """Requests that left their row for want of a mask: a heap by the time from which each may be planned again, and its sequence."""
    named_in: dict[RequestKey, InFlightPlan] = field(default_factory=dict)
    """Requests that left their row while plans in flight name them, with the last of these plans."""
    admitted: list[Admitted] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    """Gave their row to others since the shell last asked."""
    migrated: list[Request] = field(default_factory=list)
    """Lost their worker since the shell last asked."""
    recoveries: list[float] = field(default_factory=list)
    """Seconds from a loss until the request was planned again, since the shell last asked."""
    suspects: dict[RequestKey, Request] = field(default_factory=dict)
    """Requests that are tried again apart from others."""
    next_group: int = 0
    counters: Counters = field(default_factory=Counters)

    # Moves ---------------------------------------------------------------------------------------------------------------

    def enqueue(self, request: Request) -> None:
        """Waiting. Bounds were checked by submit; those who come back are never refused."""
        self.queues.setdefault(request.digest, WaitingQueue()).push(request)

    def enqueue_after_plans(self, request: Request) -> None:
        """Waiting, once each plan in flight that names the request has come back; parked until then."""
        plan = self.named_in.get(request.key)
        if plan is None:
            self.enqueue(request)
        else:
            request.state = RequestState.PARKED
            plan.parked.append(request)

    def close_plan(self, plan: InFlightPlan) -> None:
        """The plan has come back, or its worker is gone: who waited for it may be planned again."""
        for key in plan.left:
            if self.named_in.get(key) is plan:
                del self.named_in[key]
        for request in plan.parked:
            if request.state is RequestState.PARKED:
                self.enqueue(request)

    def leave_row(self, worker: WorkerState, row: int) -> Request:
        """Takes a request out of its row and charges its tenant for what was sampled."""
        plan = worker.plan_that_names(row)
        request = worker.free_row(row)
        del self.row_of[request.key]
        if plan is not None:
            plan.left.append(request.key)
            self.named_in[request.key] = plan
        queue = self.queues.get(request.digest)
        if queue is not None:
            queue.charge(request, request.output_token_ids.size - request.num_charged_outputs)
        request.num_charged_outputs = request.output_token_ids.size
        return request

    def preempt(self, worker: WorkerState, row: int) -> Request:
        """Its row goes to others."""
        request = self.send_back(worker, row)
        self.counters.preemptions += 1
        self.preempted.append(request)
        return request

    def send_back(self, worker: WorkerState, row: int) -> Request:
        """Back to the head of the queue, to be recomputed from prompt and confirmed tokens."""
        self.counters.recomputed_tokens += int(worker.rows.num_computed[row])
        request = self.leave_row(worker, row)
        request.resumed = True
        self.enqueue_after_plans(request)
        return request

    def delay(self, worker: WorkerState, row: int, now: float) -> None:
        """Out of its row for a moment: its grammar is still being compiled, and it must not hold up the others of its worker."""
        self.counters.late_masks += 1
        request = self.leave_row(worker, row)
        request.resumed = request.was_late = True
        request.state = RequestState.PARKED
        if request.output_token_ids.size > request.num_outputs_when_late:
            request.num_outputs_when_late = request.output_token_ids.size
            request.num_late = 0
        pause = min(MASK_DELAY * 2.0**request.num_late, MAX_MASK_DELAY)
        request.num_late = min(request.num_late + 1, 16)
        heapq.heappush(self.delayed, (now + pause, request.sequence, request))

    def resume_delayed(self, now: float) -> None:
        """Those whose time has come wait again."""
        while self.delayed and self.delayed[0][0] <= now:
            _, _, request = heapq.heappop(self.delayed)
            if request.state is RequestState.PARKED:
                self.enqueue_after_plans(request)

    def finish(self, request: Request) -> None:
        """Gone from the books. The caller has taken it out of its row or queue."""
        request.state = RequestState.FINISHED
        self.suspects.pop(request.key, None)
        handles = self.requests[request.router_id]
        del handles[request.handle]
        if not handles:
            del self.requests[request.router_id]

    def withdraw(self, request: Request) -> None:
        """Out of wherever it is, and gone."""
        if request.state is RequestState.RUNNING:
            self.leave_row(*self.row_of[request.key])
        elif request.state is RequestState.WAITING:
            self.queues[request.digest].discard(request)
        self.finish(request)

    def fail(self, request: Request, reason: Reason, message: str) -> None:
        """Withdraws a request and tells its router why."""
        self.withdraw(request)
        self.counters.failed[reason] += 1
        self.failed.append(Failed(request.router_id, request.handle, reason, message))

    def evacuate(self, worker: WorkerState, now: float, *, step_failed: bool, died: bool = True) -> None:
        """The worker has forgotten every row and block: all its requests go back, its plans in flight are void.

        Those in a plan that didn't come back are suspects, unless it left in peace: one of them may be what brought the step or the
        worker down.
        """
        suspects = [worker.rows.requests[row] for row in np.unique(rows_in_flight(worker)).tolist()]
        for row in worker.rows.order()[::-1].tolist():
            request = self.send_back(worker, row)
            request.lost_at = now
            self.migrated.append(request)
        worker.pool.clear_cache()
        for plan in worker.in_flight:
            plan.void = True
        if not died:
            return
        # A process that comes again has not died of it: only its first loss is evidence.
        self._suspect(
            [request for request in suspects if request is not None], 0 if step_failed else worker.incarnation
        )

    def _suspect(self, requests: list[Request], lost: int) -> None:
        """Halves the suspects of one failure; each half is tried apart. One that fails alone, and again, is poison.

        `lost` is the incarnation of a worker that was lost, 0 where a step failed.
        """
        for request in requests:
            if request.output_token_ids.size > request.num_outputs_at_failure:
                request.failures_alone = 0
                request.lost_on.clear()
                request.num_outputs_at_failure = request.output_token_ids.size
        if len(requests) == 1 and lost not in requests[0].lost_on:
            if lost:
                requests[0].lost_on.add(lost)
            requests[0].failures_alone += 1
            if requests[0].failures_alone >= self.settings.max_failures_alone:
                count = requests[0].failures_alone
                self.fail(requests[0], Reason.POISON, f"{count} steps or workers that ran nothing else came to grief")
                return
        half = (len(requests) + 1) // 2
        for group in (requests[:half], requests[half:]):
            self.next_group += 1
            for request in group:
                request.suspicion = self.next_group
                self.suspects[request.key] = request

    def clear_suspects(self, worker: WorkerState) -> None:
        """Those on this worker that have got a token since their failure are innocent."""
        for key, request in list(self.suspects.items()):
            where, row = self.row_of.get(key, (None, 0))
            rows = worker.rows
            if where is worker and rows.num_confirmed[row] - rows.num_prompt[row] > request.num_outputs_at_failure:
                request.suspicion = 0
                del self.suspects[key]


def rows_in_flight(worker: WorkerState) -> Int64Array:
    """Rows, each as often as a plan in flight names it, whose request is still the one that the plan meant."""
    live = [plan.rows[still_there(worker, plan)] for plan in worker.in_flight if not plan.void]
    return np.concatenate(live) if live else np.empty(0, np.int64)


def still_there(worker: WorkerState, plan: InFlightPlan) -> BoolArray:
    """Which of a plan's rows still hold the request that the plan meant. bool [R]."""
    same: BoolArray = worker.rows.generation[plan.rows] == plan.generation
    return same
