"""Tenants that wait share a worker token by token, at every time and not only in the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import count
from random import Random

import pytest

from scheduler.core import QueueFull, Scheduler, WorkerSpec
from tests.unit.core_steps import SPEC, answer, planned, request, scheduler_with

EIGHT_ROWS: WorkerSpec = replace(SPEC, max_rows=8, max_num_batched_tokens=64, max_model_len=256, num_blocks=1024)


class Flood:
    """Offers requests of random length by the weights of their tenants, as much as the queue takes."""

    def __init__(self, scheduler: Scheduler, seed: int) -> None:
        self.scheduler = scheduler
        self.random = Random(seed)
        self.handles = count(1)
        self.tenant_of: dict[int, str] = {}

    def offer(self, weights: dict[str, int], number: int) -> None:
        """So many requests, refused or not."""
        for tenant in self.random.choices(list(weights), list(weights.values()), k=number):
            handle = next(self.handles)
            self.tenant_of[handle] = tenant
            max_tokens = self.random.randint(20, 60)
            try:
                self.scheduler.submit(request(handle, max_tokens=max_tokens, tenant=tenant), 0.0)
            except QueueFull:
                continue

    def run(self, weights: dict[str, int], steps: int) -> Counter[str]:
        """Output tokens of each tenant in so many steps."""
        served: Counter[str] = Counter()
        for _ in range(steps):
            self.offer(weights, 2)  # some five times of what eight rows can do
            for columns in self.scheduler.apply(1, answer(planned(self.scheduler)), 0.0):
                served.update(self.tenant_of[handle] for handle in columns.handles.tolist())
        return served


@pytest.mark.parametrize("seed", range(3))
def test_who_sends_ten_times_as_much_gets_no_more(seed: int) -> None:
    scheduler = scheduler_with(EIGHT_ROWS, max_waiting_requests=12)
    flood = Flood(scheduler, seed)
    assert flood.run({"heavy": 1}, 200)["heavy"] > 190 * 8  # alone it has everything
    weights = {"heavy": 10, "light": 1}
    flood.run(weights, 200)
    # In each time in which a row changes hands once or twice, so not by turns either.
    shares = [(served := flood.run(weights, 80))["light"] / served.total() for _ in range(20)]
    assert all(0.35 < share < 0.65 for share in shares), shares
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.02)


def test_every_token_is_charged_once() -> None:
    scheduler = scheduler_with(EIGHT_ROWS, max_waiting_requests=12)
    flood = Flood(scheduler, 5)
    weights = {"a": 1, "b": 1, "c": 1}
    flood.run(weights, 100)  # from now on none of them ever waits for nothing, so no counter is lifted or forgotten
    (queue,) = scheduler._state.queues.values()
    rows = scheduler._state.workers[1].rows

    def charged() -> float:
        for running, num_tokens in rows.take_uncharged():
            queue.charge(running, num_tokens)
        return sum(tenant.served for tenant in queue._classes[0].tenants.values())

    before, admitted = charged(), scheduler.counters.admitted
    served = flood.run(weights, 300)
    assert charged() - before == served.total() + 4 * (scheduler.counters.admitted - admitted)
    assert rows.take_uncharged() == []
    for handle in list(scheduler._state.requests[1]):
        scheduler.cancel((1, handle), 0.0)
    assert rows._accounts == {}


def test_tenants_that_come_and_go_are_charged_apart() -> None:
    """There are as many accounts as rows at most, so a tenant has one that another had before."""
    scheduler = scheduler_with(EIGHT_ROWS)
    rows = scheduler._state.workers[1].rows
    for handle in range(1, 41):
        scheduler.submit(request(handle, max_tokens=10, tenant=f"{handle}"), 0.0)
        if handle > 5:
            scheduler.cancel((1, handle - 5 + handle % 2), 0.0)
        scheduler.apply(1, answer(planned(scheduler)), 0.0)
        found = [(running.handle, num_tokens) for running, num_tokens in rows.take_uncharged()]
        assert found == [(other, 1) for other in sorted(r.handle for r in rows.requests if r is not None)]


def test_a_preempted_one_is_not_charged_again() -> None:
    scheduler = scheduler_with(replace(EIGHT_ROWS, max_rows=1))
    scheduler.submit(request(1, max_tokens=10, tenant="a"), 0.0)
    scheduler.submit(request(2, max_tokens=10, tenant="a"), 0.0)
    for _ in range(3):
        scheduler.apply(1, answer(planned(scheduler)), 0.0)
    (queue,) = scheduler._state.queues.values()
    served = queue._classes[0].tenants
    scheduler.submit(request(3, max_tokens=1, priority=1, tenant="a"), 0.0)
    scheduler.apply(1, answer(planned(scheduler)), 0.0)
    assert served["a"].served == 4 + 3
    for _ in range(4):
        scheduler.apply(1, answer(planned(scheduler)), 0.0)
    rows = scheduler._state.workers[1].rows
    assert [(running.handle, num_tokens) for running, num_tokens in rows.take_uncharged()] == [(1, 4)]
