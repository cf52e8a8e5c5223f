"""Steps of the same rows are looked up once: every plan and event is what it would be without that."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from scheduler.core import Request, SamplingParams, Scheduler, Settings, StepPlan, StepResult, WorkerSpec
from scheduler.core.lineup import Lineup

SPEC = WorkerSpec(
    "m", b"d" * 32, max_rows=6, max_num_batched_tokens=24, max_model_len=96, block_size=4, num_blocks=90, run_ahead=3
)


def described(plan: StepPlan) -> dict[str, Any]:
    """What a plan says, whatever the order of its rows."""
    columns = zip(plan.rows.tolist(), plan.num_scheduled.tolist(), plan.num_samples.tolist(), strict=True)
    return {
        "step": plan.step_id,
        "new": [(new.row, new.request.handle, new.token_ids.tolist(), new.block_ids.tolist()) for new in plan.new_rows],
        "freed": plan.freed_rows.tolist(),
        "rows": sorted(columns),
        "blocks": sorted(zip(plan.append_rows.tolist(), plan.append_block_ids.tolist(), strict=True)),
        "chunks": (plan.chunk_rows.tolist(), plan.chunk_lens.tolist(), plan.chunk_token_ids.tolist()),
    }


def run(spec: WorkerSpec, seed: int, arrivals: float) -> tuple[list[Any], int]:
    """Everything that a scheduler says in 500 steps, and how many of its steps were of a lineup."""
    random = np.random.default_rng(seed)
    scheduler = Scheduler(Settings())
    scheduler.add_worker(1, spec)
    flying: deque[StepPlan] = deque()
    told: list[Any] = []
    of_lineup = handle = 0
    for step in range(500):
        for _ in range(int(random.random() < arrivals)):
            handle += 1
            prompt = random.integers(0, 50, int(random.integers(1, 40)), np.int32)
            params = SamplingParams(
                int(random.integers(2, 70)), stop_token_ids=(3,), min_tokens=int(random.integers(3))
            )
            options = {"priority": int(random.integers(2)), "arrival": float(step), "tenant": f"t{handle % 3}"}
            scheduler.submit(Request(1 + handle % 2, handle, "m", prompt, params, **options), float(step))
        if random.random() < arrivals / 4 and handle:
            gone = int(random.integers(1, handle + 1))
            scheduler.cancel((1 + gone % 2, gone), float(step))
        while (plan := scheduler.plan(1, float(step))) is not None:
            flying.append(plan)
            told.append(described(plan))
            of_lineup += scheduler._state.workers[1].in_flight[-1].lineup is not None
            scheduler.check_integrity()
        if flying:
            plan = flying.popleft()
            # A row's token follows from its request and position, not from its place in the plan.
            sampling = plan.rows[plan.num_samples > 0]
            rows = scheduler._state.workers[1].rows
            tokens = ((rows.handle[sampling] * 31 + rows.num_confirmed[sampling] * 7) % 53).astype(np.int32)
            status = np.zeros(sampling.size, np.uint8)
            if random.random() < 0.02 and sampling.size:
                status[np.argmin(sampling)] = 1
            fine = status == 0
            result = StepResult(plan.step_id, fine.astype(np.uint8), tokens[fine], status if status.any() else None)
            for columns in scheduler.apply(1, result, float(step)):
                ends = columns.num_tokens.cumsum()
                entries = [
                    (h, first, columns.token_ids[end - n : end].tolist(), reason)
                    for h, first, n, end, reason in zip(
                        columns.handles.tolist(),
                        columns.first_output_index.tolist(),
                        columns.num_tokens.tolist(),
                        ends.tolist(),
                        columns.finish_reason.tolist(),
                        strict=True,
                    )
                ]
                told.append((columns.router_id, sorted(entries)))
            scheduler.check_integrity()
    return told, of_lineup


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["roomy", "few blocks", "window", "tight budget"])
def test_nothing_is_said_that_would_not_be_said_without(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {
        "roomy": {},
        "few blocks": {"num_blocks": 25},
        "window": {"window": 9},
        "tight budget": {"max_num_batched_tokens": 6},  # chunks of a token, beside decodes
    }[kind]
    spec = replace(SPEC, **changes)
    arrivals = 0.1 if kind == "tight budget" else 0.05
    said, of_lineup = run(spec, seed, arrivals)
    monkeypatch.setattr(Lineup, "holds", lambda self, rows: False)
    expected, none = run(spec, seed, arrivals)
    assert (of_lineup > 100, none) == (True, 0)
    assert said == expected
