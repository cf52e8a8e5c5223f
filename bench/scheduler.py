"""What a step costs the scheduler: microseconds per plan + apply in steady-state decode.

    python -m bench.scheduler [--json FILE] [--steps 1000]

First for each number of running rows and waiting requests, with one worker and two plans in flight; the rows end and are
replaced as in service, and once none of them ends. Then for eight mock workers whose steps take 2 ms each, served by one thread
in real time: the share of the time that the workers were busy says whether one scheduler keeps up.
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from scheduler.core import Request, SamplingParams, Scheduler, Settings, StepPlan, StepResult, TokenColumns, WorkerSpec

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 512
DIGEST = b"bench".ljust(32, b"\0")


@dataclass(frozen=True, slots=True)
class StepCost:
    """Microseconds per plan + apply."""

    rows: int
    waiting: int
    ends: bool
    """Rows end and are replaced."""
    median_us: float
    p99_us: float
    plan_median_us: float
    apply_median_us: float


@dataclass(frozen=True, slots=True)
class ManyWorkers:
    """Several mock workers served by one scheduler in real time."""

    workers: int
    rows_each: int
    step_ms: float
    steps_per_second: float
    busy_share: float
    """Time that the workers computed, of all their time. 1 means that none ever waited for its next plan."""
    median_us: float
    p99_us: float


def make_spec(rows: int, output_tokens: int = OUTPUT_TOKENS) -> WorkerSpec:
    """A worker with room for `rows` requests of this benchmark."""
    blocks_each = -(-(PROMPT_TOKENS + output_tokens) // 16) + 1
    return WorkerSpec(
        model="bench",
        model_digest=DIGEST,
        max_rows=rows,
        max_num_batched_tokens=max(2048, rows),
        max_model_len=max(2048, PROMPT_TOKENS + output_tokens),
        block_size=16,
        num_blocks=blocks_each * rows + 64,
    )


class Load:
    """Makes requests, and answers plans as a worker would, without the work."""

    def __init__(self, seed: int, output_tokens: tuple[int, int] = (OUTPUT_TOKENS // 4, OUTPUT_TOKENS)) -> None:
        self.output_tokens = output_tokens
        self.random = np.random.default_rng(seed)
        self.next_handle = 0
        self.tokens = self.random.integers(0, 32_000, 4096, np.int32)
        self.ones = np.ones(4096, np.uint8)

    def submit(self, scheduler: Scheduler, count: int, now: float) -> None:
        """Requests with random prompts; output lengths vary, so that rows don't march in step."""
        for _ in range(count):
            prompt = self.random.integers(0, 32_000, PROMPT_TOKENS, np.int32)
            max_tokens = int(self.random.integers(*self.output_tokens))
            params = SamplingParams(max_tokens, stop_token_ids=(32_001, 32_002))
            tenant = f"tenant-{self.next_handle % 50}"
            request = Request(1, self.next_handle, "bench", prompt, params, tenant=tenant, arrival=now, deadline=1e9)
            scheduler.submit(request, now)
            self.next_handle += 1

    def answer(self, plan: StepPlan) -> StepResult:
        """One token for each row that samples."""
        count = int(plan.num_samples.sum())
        start = plan.step_id * 7 % (self.tokens.size - count)
        return StepResult(plan.step_id, self.ones[:count], self.tokens[start : start + count])


def num_finished(events: list[TokenColumns]) -> int:
    """Requests that a step ended."""
    return sum(int(np.count_nonzero(columns.finish_reason)) for columns in events)


def measure(rows: int, waiting: int, steps: int, ends: bool = True) -> StepCost:
    """Steady state of one worker with `rows` rows running; each that ends is replaced, from the queue if there is one."""
    scheduler = Scheduler(Settings(max_waiting_requests=waiting + rows + 1))
    warm_up = 2 * PROMPT_TOKENS * rows // 2048 + 20
    forever = steps + warm_up + 1
    load = Load(rows) if ends else Load(rows, (forever, forever + 1))
    scheduler.add_worker(1, make_spec(rows) if ends else make_spec(rows, forever))
    load.submit(scheduler, rows + waiting, 0.0)
    plans: deque[StepPlan] = deque()
    planning, applying = np.zeros(steps), np.zeros(steps)
    missing = 0
    for step in range(-warm_up, steps):
        load.submit(scheduler, missing, float(step))
        missing = 0
        begin = time.perf_counter()
        plan = scheduler.plan(1, float(step))
        planned = time.perf_counter()
        if plan is not None:
            plans.append(plan)
        answer = load.answer(plans.popleft()) if len(plans) == 2 or plan is None else None
        resumed = time.perf_counter()
        if answer is not None:
            missing = num_finished(scheduler.apply(1, answer, float(step)))
        if step >= 0:
            planning[step], applying[step] = planned - begin, time.perf_counter() - resumed
    both = (planning + applying) * 1e6
    return StepCost(
        rows,
        waiting,
        ends,
        median_us=float(np.median(both)),
        p99_us=float(np.percentile(both, 99)),
        plan_median_us=float(np.median(planning) * 1e6),
        apply_median_us=float(np.median(applying) * 1e6),
    )


def measure_many_workers(workers: int, rows: int, step_seconds: float, seconds: float) -> ManyWorkers:
    """Each mock worker runs its plans one after the other, `step_seconds` each, without using the processor."""
    scheduler, load = Scheduler(Settings()), Load(seed=workers)
    results: list[tuple[float, int, StepPlan]] = []  # (when it is ready, worker, plan)
    free_at = [0.0] * (workers + 1)
    for worker_id in range(1, workers + 1):
        scheduler.add_worker(worker_id, make_spec(rows))
    load.submit(scheduler, workers * rows, 0.0)
    costs: list[float] = []
    busy = 0.0
    start = now = time.perf_counter()
    while now < start + seconds:
        for worker_id in scheduler.workers_to_plan():
            begin = time.perf_counter()
            plan = scheduler.plan(worker_id, begin)
            costs.append(time.perf_counter() - begin)
            if plan is not None:
                free_at[worker_id] = max(free_at[worker_id], time.perf_counter()) + step_seconds
                heapq.heappush(results, (free_at[worker_id], worker_id, plan))
        ready, worker_id, plan = heapq.heappop(results)
        if ready > time.perf_counter():
            time.sleep(max(0.0, ready - time.perf_counter()))
        answer = load.answer(plan)
        begin = time.perf_counter()
        events = scheduler.apply(worker_id, answer, begin)
        now = time.perf_counter()
        costs[-1] += now - begin
        busy += step_seconds
        load.submit(scheduler, num_finished(events), now)
    elapsed = now - start
    cost_us = np.array(costs) * 1e6
    return ManyWorkers(
        workers,
        rows,
        step_seconds * 1e3,
        steps_per_second=busy / step_seconds / elapsed,
        busy_share=busy / (elapsed * workers),
        median_us=float(np.median(cost_us)),
        p99_us=float(np.percentile(cost_us, 99)),
    )


def main() -> None:
    """Runs everything and prints a table, and JSON if asked."""
    parser = argparse.ArgumentParser(description="Cost of scheduler steps")
    parser.add_argument("--steps", type=int, default=1000, help="measured steps for each case")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 1_000, 100_000])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the run with eight workers")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()

    print(f"{'rows':>6} {'waiting':>12} {'median us':>10} {'p99 us':>8} {'plan':>8} {'apply':>8}")
    costs = []
    for rows in arguments.rows:
        for waiting, ends in [*((waiting, True) for waiting in arguments.waiting), (0, False)]:
            cost = measure(rows, waiting, arguments.steps, ends)
            costs.append(cost)
            name = waiting if ends else "0, none ends"
            parts = f"{cost.plan_median_us:8.0f} {cost.apply_median_us:8.0f}"
            print(f"{rows:6} {name:>12} {cost.median_us:10.0f} {cost.p99_us:8.0f} {parts}", flush=True)
    many = measure_many_workers(8, 32, 0.002, arguments.seconds)
    print(
        f"{many.workers} workers of {many.step_ms:g} ms, {many.rows_each} rows each: {many.steps_per_second:.0f} steps/s, "
        f"workers busy {many.busy_share:.0%}, plan + apply median {many.median_us:.0f} us, p99 {many.p99_us:.0f} us"
    )
    if arguments.json:
        report = {
            "command": " ".join(["python -m bench.scheduler", *sys.argv[1:]]),
            "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
            "numpy": np.__version__,
            "step_cost": [asdict(cost) for cost in costs],
            "many_workers": asdict(many),
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
