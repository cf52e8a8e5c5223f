"""The scheduler's face to the shell. Pure: `now` is passed in (seconds, any monotonic clock), nothing waits, nothing is sent.

The shell's loop: feed what arrives (`submit`, `cancel`, `add_worker`, `apply`, …), then for each of `workers_to_plan()`
send what `plan` gives, then deliver what `apply` returned and what `take_admitted`, `take_preempted`, `take_migrated` and
`take_failed` hold. Call `expire` at `next_deadline()`. One thread at a time.
"""

from __future__ import annotations

import heapq

from scheduler.core.apply import apply_result
from scheduler.core.errors import (
    DuplicateRequest,
    InvalidField,
    ModelChanged,
    ModelUnknown,
    NoWorker,
    QueueFull,
    Reason,
    UnknownWorker,
    Unplaceable,
    Unsupported,
)
from scheduler.core.integrity import check_integrity
from scheduler.core.placement import fits
from scheduler.core.plan import Admitted, Failed, Migrated, Preempted, StepPlan, StepResult, TokenColumns
from scheduler.core.planner import plan_step
from scheduler.core.request import Request, RequestKey
from scheduler.core.settings import Settings, WorkerSpec
from scheduler.core.snapshot import Load, Snapshot, take_load, take_snapshot
from scheduler.core.state import Counters, SchedulerState, WorkerState

MIN_RETRY_AFTER = 0.1
MAX_RETRY_AFTER = 30.0
DEADLINES_COMPACT_ABOVE = 64
MAX_SHARES = 4
"""What waits is never more than so many times the bounds of one tenant, however many tenants and priorities there are."""


class Scheduler:
    """Queue, placement and step planning for all workers of one scheduler process."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._state = SchedulerState(settings or Settings())
        self._next_sequence = 0
        self._deadlines: list[tuple[float, int, Request]] = []
        self._compact_deadlines_at = DEADLINES_COMPACT_ABOVE

    # Workers -------------------------------------------------------------------------------------------------------------

    def add_worker(self, worker_id: int, spec: WorkerSpec, incarnation: int | None = None) -> None:
        """A worker has enlisted, with every row and block free. Its step_ids start at 1. Raises InvalidField.

        `incarnation` names its process, not 0; by default `worker_id`, as if it never came twice.
        """
        state = self._state
        if worker_id in state.workers:
            raise InvalidField("worker_id", f"{worker_id} is enlisted already")
        try:
            worker = WorkerState.new(worker_id, spec, worker_id if incarnation is None else incarnation)
        except MemoryError:
            raise InvalidField("max_rows", "the tables of so many rows and blocks do not fit in memory") from None
        state.workers[worker_id] = worker
        state.workers_of.setdefault(spec.model_digest, []).append(worker)
        state.models.setdefault(spec.model, set()).add(spec.model_digest)
        state.orphaned_at.pop(spec.model_digest, None)

    def remove_worker(self, worker_id: int, now: float, *, died: bool = True) -> None:
        """The worker is gone: its requests go back to the head of the queue, prompt and confirmed tokens kept apart.

        Unless it `died` they are under no suspicion. Raises UnknownWorker.
        """
        state = self._state
        worker = self._worker(worker_id)
        digest = worker.spec.model_digest
        state.evacuate(worker, now, step_failed=False, died=died)
        for plan in worker.in_flight:
            state.close_plan(plan)
        del state.workers[worker_id]
        state.workers_of[digest].remove(worker)
        if not state.workers_of[digest]:
            del state.workers_of[digest]
            if digest in state.queues:
                state.orphaned_at[digest] = now

    def drain_worker(self, worker_id: int) -> None:
        """No new rows for this worker; running ones go on. It is done when `num_running` is 0. Raises UnknownWorker."""
        self._worker(worker_id).draining = True

    def is_in_use(self, digest: bytes) -> bool:
        """Whether a worker holds this model digest or a request waits for it."""
        queue = self._state.queues.get(digest)
        return digest in self._state.workers_of or (queue is not None and queue.num_requests > 0)

    def num_running(self, worker_id: int) -> int:
        """Requests in rows of this worker. Raises UnknownWorker."""
        return self._worker(worker_id).rows.num_running

    # Requests ------------------------------------------------------------------------------------------------------------

    def submit(self, request: Request, now: float) -> None:
        """Puts a request into the waiting queue. Afterwards its router hears of it until a terminal entry, `Failed` or `cancel`.

        A request without a digest is pinned to the one that most workers of the model's name hold, now and for good. A request
        that was accepted before is not refused for a full queue, and it waits if no worker is there at present.

        Raises DuplicateRequest, ModelUnknown, ModelChanged, NoWorker, Unplaceable, Unsupported or QueueFull; nothing was changed then.
        """
        state = self._state
        if request.handle in state.requests.get(request.router_id, {}):
            state.counters.refused += 1
            raise DuplicateRequest(f"handle {request.handle} is in use")
        try:
            digest = self.digest_for(request.model, request.digest, accepted=request.accepted)
            limit = self._limit(request, digest)
            self._check_queue(request, now)
        except Exception:
            state.counters.refused += 1
            raise
        if not any(queue.num_requests for queue in state.queues.values()):
            state.queue_moved_at = now
        request.digest, request.limit, request.submitted = digest, limit, now
        request.sequence = self._next_sequence
        self._next_sequence += 1
        state.counters.submitted += 1
        state.requests.setdefault(request.router_id, {})[request.handle] = request
        if request.suspicion:  # another scheduler found it so, and its group comes with it
            state.next_group = max(state.next_group, request.suspicion)
            request.num_outputs_at_failure = request.output_token_ids.size
            state.suspects[request.key] = request
        state.enqueue_after_plans(request)
        if digest not in state.workers_of:
            state.orphaned_at.setdefault(digest, now)
        if request.deadline is not None:
            self._push_deadline(request.deadline, request)

    def digest_for(self, model: str, digest: bytes, *, accepted: bool) -> bytes:
        """What a request would be pinned to: its own digest, or the one of its model that most workers hold.

        Raises ModelUnknown, ModelChanged or NoWorker; what was accepted before waits for its digest instead.
        """
        state = self._state
        known = state.models.get(model, set())
        served = [d for d in known if any(not w.draining for w in state.workers_of.get(d, ()))]
        if digest:
            if digest in served or accepted:
                return digest
            if served:
                raise ModelChanged(f"model {model!r} is served with another digest")
        elif served:
            return max(served, key=lambda d: (len(state.workers_of[d]), d))
        if known:
            raise NoWorker(f"no worker serves model {model!r} at present")
        raise ModelUnknown(f"no model {model!r}")

    def cancel(self, key: RequestKey, now: float) -> bool:
        """Ends a request without an event; its handle is free at once. False, and nothing happens, if it is unknown."""
        router_id, handle = key
        request = self._state.requests.get(router_id, {}).get(handle)
        if request is None:
            return False
        self._state.withdraw(request)
        self._state.counters.cancelled += 1
        return True

    def detach_router(self, router_id: int, now: float) -> int:
        """Cancels everything that the router submitted; returns how many requests that were."""
        handles = list(self._state.requests.get(router_id, {}))
        for handle in handles:
            self.cancel((router_id, handle), now)
        return len(handles)

    # Steps ---------------------------------------------------------------------------------------------------------------

    def workers_to_plan(self) -> list[int]:
        """Workers for which `plan` may have something."""
        return [worker_id for worker_id in self._state.workers if self.can_plan(worker_id)]

    def can_plan(self, worker_id: int) -> bool:
        """Whether `plan` may have something for this worker: O(1), and `plan` may still find that it hasn't."""
        state = self._state
        worker = self._worker(worker_id)
        if len(worker.in_flight) >= worker.spec.run_ahead:
            return False
        if worker.freed_rows or worker.rows.num_running:
            return True
        queue = state.queues.get(worker.spec.model_digest)
        return queue is not None and queue.num_requests > 0 and not worker.draining

    def plan(self, worker_id: int, now: float) -> StepPlan | None:
        """The worker's next step, to be sent to it; None if there is nothing to do or its pipeline is full. Raises UnknownWorker."""
        return plan_step(self._state, self._worker(worker_id), now)

    def apply(self, worker_id: int, result: StepResult, now: float) -> list[TokenColumns]:
        """Books a result; returns the events of each router. Raises UnknownWorker, and InvalidResult with nothing changed."""
        return apply_result(self._state, self._worker(worker_id), result, now)

    # Time ----------------------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """Fails requests whose deadline has passed, waiting or running, and those whose model has had no worker for too long.

        Those that were put off wait to be planned again.
        """
        state = self._state
        state.resume_delayed(now)
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heapq.heappop(self._deadlines)
            if self._is_live(request):
                state.fail(request, Reason.DEADLINE, "the deadline passed")
        timeout = state.settings.no_worker_timeout
        for digest in [d for d, since in state.orphaned_at.items() if now >= since + timeout]:
            del state.orphaned_at[digest]
            for request in list(state.queues.get(digest, ())):
                state.fail(request, Reason.NO_WORKER, f"no worker held the model for {timeout:g} s")
            state.queues.pop(digest, None)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do, or None."""
        while self._deadlines and not self._is_live(self._deadlines[0][2]):
            heapq.heappop(self._deadlines)
        times = [self._deadlines[0][0]] if self._deadlines else []
        if self._state.delayed:
            times.append(self._state.delayed[0][0])
        times += [since + self._state.settings.no_worker_timeout for since in self._state.orphaned_at.values()]
        return min(times, default=None)

    # Events and views ----------------------------------------------------------------------------------------------------

    def take_admitted(self) -> list[Admitted]:
        """Requests that got a row since the last call."""
        taken, self._state.admitted = self._state.admitted, []
        return taken

    def take_preempted(self) -> list[Preempted]:
        """Requests that gave their row to others since the last call, and wait. To be told after those that got a row."""
        preempted, self._state.preempted = self._state.preempted, []
        waiting = {request.key: request for request in preempted if request.is_waiting}
        return [Preempted(request.router_id, request.handle) for request in waiting.values()]

    def take_migrated(self) -> list[Migrated]:
        """Requests that lost their worker since the last call and are still here."""
        migrated, self._state.migrated = self._state.migrated, []
        return [
            Migrated(request.router_id, request.handle, request.suspicion, request.failures_alone)
            for request in migrated
            if not request.is_finished
        ]

    def take_recoveries(self) -> list[float]:
        """Seconds that requests waited from the loss of their worker until they were planned again, since the last call."""
        taken, self._state.recoveries = self._state.recoveries, []
        return taken

    def take_failed(self) -> list[Failed]:
        """Requests that were failed by `plan`, `apply`, `remove_worker` or `expire`, since the last call."""
        taken, self._state.failed = self._state.failed, []
        return taken

    @property
    def counters(self) -> Counters:
        """Totals since the start."""
        return self._state.counters

    def load(self) -> Load:
        """Four numbers for routers that choose between schedulers."""
        return take_load(self._state)

    def snapshot(self) -> Snapshot:
        """Queue, rows and block tables for an inspector; no token ids. Copies: O(rows + blocks + waiting priorities)."""
        return take_snapshot(self._state)

    def check_integrity(self) -> None:
        """Raises RuntimeError if the books don't balance. O(everything): for tests and idle moments."""
        check_integrity(self._state)

    # Inside --------------------------------------------------------------------------------------------------------------

    def _worker(self, worker_id: int) -> WorkerState:
        worker = self._state.workers.get(worker_id)
        if worker is None:
            raise UnknownWorker(f"no worker {worker_id}")
        return worker

    def _limit(self, request: Request, digest: bytes) -> int:
        """Tokens at most, prompt included; 0 if no worker is there to tell. Raises Unplaceable or Unsupported."""
        specs = [worker.spec for worker in self._state.workers_of.get(digest, ())]
        if not specs:
            return 0
        if request.under_grammar:
            specs = [spec for spec in specs if spec.grammars]
            if not specs:
                raise Unsupported(f"no worker of model {request.model!r} decodes under a grammar")
        longest = max(spec.max_model_len for spec in specs)
        limit = min(request.num_prompt_tokens + request.sampling.max_tokens, longest)
        if request.num_known_tokens >= limit:
            raise Unplaceable(f"{request.num_known_tokens} tokens leave no room in a context of {longest}")
        if not any(fits(spec, request.num_known_tokens, limit) for spec in specs):
            raise Unplaceable(f"no worker's KV cache can hold {limit} tokens")
        return limit

    def _check_queue(self, request: Request, now: float) -> None:
        """Raises QueueFull where the request's tenant, at its priority, or everything together has too much waiting."""
        state, settings = self._state, self._state.settings
        if request.accepted:
            return
        queues, size = state.queues.values(), request.queue_size
        loads = [queue.load_on(request.tenant, request.priority) for queue in queues]
        requests = sum(own.requests + everyone.requests for own, everyone in loads)
        tokens = sum(own.tokens + everyone.tokens for own, everyone in loads)
        num_waiting = sum(queue.num_requests for queue in queues)
        num_tokens = sum(queue.num_tokens for queue in queues)
        if (
            requests >= 2 * settings.max_waiting_requests
            or tokens + 2 * size > 2 * settings.max_waiting_tokens
            or num_waiting >= MAX_SHARES * settings.max_waiting_requests
            or num_tokens + size > MAX_SHARES * settings.max_waiting_tokens
        ):
            raise QueueFull(self._retry_after(num_waiting, now))

    def _retry_after(self, num_waiting: int, now: float) -> float:
        """Seconds in which a tenth of the queue will have moved on, as newcomers are admitted at present."""
        # A queue that has stopped moving is as slow as it has stood.
        gap = max(self._state.admission_gap, now - self._state.queue_moved_at)
        return min(MAX_RETRY_AFTER, max(MIN_RETRY_AFTER, gap * max(1.0, num_waiting / 10)))

    def _push_deadline(self, deadline: float, request: Request) -> None:
        heapq.heappush(self._deadlines, (deadline, request.sequence, request))
        if len(self._deadlines) > self._compact_deadlines_at:
            self._deadlines = [entry for entry in self._deadlines if self._is_live(entry[2])]
            heapq.heapify(self._deadlines)
            self._compact_deadlines_at = 2 * len(self._deadlines) + DEADLINES_COMPACT_ABOVE

    @staticmethod
    def _is_live(request: Request) -> bool:
        return not request.is_finished
