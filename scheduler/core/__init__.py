"""The scheduler core: pure planning, no sockets, no clock, no threads, no GPU. Only the standard library and numpy.

    scheduler.py    the face: Scheduler.submit, plan, apply, …
    planner.py      plan one step for one worker: plan_step
    commit.py       the end of it: books and columns
    lineup.py       what steps of the same rows need not look up again
    batch.py        the step while it is composed
    preemption.py   which running requests make room for a more important one
    apply.py        book one step's result: apply_result
    placement.py    which worker a waiting request should go to
    waiting.py      the queue: priorities, fairness between tenants
    rows.py         running requests as numpy columns
    block_pool.py   blocks: owners, free list, cache
    prefix.py       block hashes
    state.py        what is remembered; moves between waiting, running, parked and gone
    plan.py         StepPlan, StepResult and events
    integrity.py    what must hold between any two calls

Use:

    scheduler = Scheduler(Settings())
    scheduler.add_worker(1, WorkerSpec(model="m", model_digest=digest, …))
    scheduler.submit(Request(router_id=7, handle=1, model="m", prompt_token_ids=ids, sampling=SamplingParams(max_tokens=64)), now)
    for worker_id in scheduler.workers_to_plan():
        plan = scheduler.plan(worker_id, now)          # StepPlan | None: columns named as in step.proto
    for columns in scheduler.apply(1, StepResult(...), now):
        ...                                            # TokenColumns: one TokenBatch per router
    scheduler.take_admitted(); scheduler.take_preempted()                       # after any call
    scheduler.take_migrated(); scheduler.take_failed()
    scheduler.expire(now)                              # at scheduler.next_deadline()
"""

from scheduler.core.errors import (
    DuplicateRequest,
    InvalidField,
    InvalidResult,
    ModelChanged,
    ModelUnknown,
    NoWorker,
    QueueFull,
    Reason,
    SchedulerError,
    UnknownWorker,
    Unplaceable,
    Unsupported,
)
from scheduler.core.plan import (
    Admitted,
    Failed,
    Migrated,
    NewRow,
    Preempted,
    RowStatus,
    StepPlan,
    StepResult,
    TokenColumns,
)
from scheduler.core.request import FinishReason, Request, RequestKey, RequestState, SamplingParams
from scheduler.core.scheduler import Scheduler
from scheduler.core.settings import Settings, WorkerSpec
from scheduler.core.snapshot import Load, QueueSnapshot, Snapshot, WorkerSnapshot
from scheduler.core.state import Counters

__all__ = [
    "Admitted",
    "Counters",
    "DuplicateRequest",
    "Failed",
    "FinishReason",
    "InvalidField",
    "InvalidResult",
    "Load",
    "Migrated",
    "ModelChanged",
    "ModelUnknown",
    "NewRow",
    "NoWorker",
    "Preempted",
    "QueueFull",
    "QueueSnapshot",
    "Reason",
    "Request",
    "RequestKey",
    "RequestState",
    "RowStatus",
    "SamplingParams",
    "Scheduler",
    "SchedulerError",
    "Settings",
    "Snapshot",
    "StepPlan",
    "StepResult",
    "TokenColumns",
    "UnknownWorker",
    "Unplaceable",
    "Unsupported",
    "WorkerSnapshot",
    "WorkerSpec",
]
