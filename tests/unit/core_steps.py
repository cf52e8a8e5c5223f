"""A scheduler core and its workers, requests for it, and steps that are planned and answered."""

from __future__ import annotations

import numpy as np

from scheduler.core import Request, SamplingParams, Scheduler, Settings, StepPlan, StepResult, TokenColumns, WorkerSpec

DIGEST = b"d" * 32
SPEC = WorkerSpec("m", DIGEST, max_rows=4, max_num_batched_tokens=16, max_model_len=64, block_size=4, num_blocks=64)


def scheduler_with(*specs: WorkerSpec, **settings: object) -> Scheduler:
    scheduler = Scheduler(Settings(**settings))
    for worker_id, spec in enumerate(specs, start=1):
        scheduler.add_worker(worker_id, spec)
    return scheduler


def request(handle: int, num_prompt: int = 4, max_tokens: int = 4, *, router_id: int = 1, **options: object) -> Request:
    sampling = {k: options.pop(k) for k in ("min_tokens", "stop_token_ids", "prompt_logprobs") if k in options}
    prompt = options.pop("prompt", np.arange(num_prompt) + 1000 * handle)
    model = str(options.pop("model", "m"))
    return Request(router_id, handle, model, prompt, SamplingParams(max_tokens, **sampling), **options)


def planned(scheduler: Scheduler, worker_id: int = 1) -> StepPlan:
    plan = scheduler.plan(worker_id, 0.0)
    assert plan is not None
    return plan


def answer(plan: StepPlan, token: int = 7, **options: object) -> StepResult:
    count = int(plan.num_samples.sum())
    return StepResult(plan.step_id, np.ones(count, np.uint8), np.full(count, token, np.int32), **options)


def step(scheduler: Scheduler, worker_id: int = 1, token: int = 7) -> list[TokenColumns]:
    return scheduler.apply(worker_id, answer(planned(scheduler, worker_id), token), 0.0)
