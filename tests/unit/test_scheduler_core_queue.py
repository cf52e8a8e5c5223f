"""The waiting queue: order, fairness, lazy deletion."""

from __future__ import annotations

from itertools import count

import numpy as np

from scheduler.core import Request, SamplingParams
from scheduler.core.waiting import WaitingQueue

SEQUENCE = count()


def request(
    tenant: str = "a", *, priority: int = 0, tokens: int = 1, outputs: int = 0, arrival: float = 0.0
) -> Request:
    made = Request(
        1,
        next(SEQUENCE),
        "m",
        np.zeros(tokens, np.int32),
        SamplingParams(100),
        np.zeros(outputs, np.int32),
        tenant=tenant,
        priority=priority,
        arrival=arrival,
    )
    made.sequence = made.handle
    return made


def filled(*requests: Request) -> WaitingQueue:
    queue = WaitingQueue()
    for entry in requests:
        queue.push(entry)
    return queue


def drain(queue: WaitingQueue, *, charge: int = 0) -> list[Request]:
    order = []
    while (entry := queue.pop()) is not None:
        if charge:
            queue.charge(entry, charge * entry.num_known_tokens)
        order.append(entry)
    assert (queue.num_requests, queue.num_tokens) == (0, 0)
    return order


def test_priority_then_resumed_then_arrival() -> None:
    late, early = request(outputs=1, arrival=2.0), request(outputs=1, arrival=1.0)
    first, second, urgent = request(), request(), request(priority=5)
    assert drain(filled(first, late, second, urgent, early)) == [urgent, early, late, first, second]


def test_tenants_share_by_tokens_not_by_requests() -> None:
    large = [request("large", tokens=30) for _ in range(4)]
    small = [request("small", tokens=10) for _ in range(12)]
    order = drain(filled(*large, *small), charge=1)
    served = {"large": 0, "small": 0}
    for entry in order[:12]:
        served[entry.tenant] += entry.num_known_tokens
        assert abs(served["large"] - served["small"]) <= 30


def test_idling_saves_up_nothing() -> None:
    queue = filled(*[request("busy", tokens=10) for _ in range(60)])
    for _ in range(20):
        entry = queue.pop()
        assert entry is not None
        queue.charge(entry, 10)
    for _ in range(20):
        queue.push(request("late", tokens=10))
    tenants = []
    for _ in range(20):
        entry = queue.pop()
        assert entry is not None
        queue.charge(entry, 10)
        tenants.append(entry.tenant)
    assert 9 <= tenants.count("late") <= 11


def test_put_back_keeps_the_order() -> None:
    requests = [request(), request(), request("b"), request(outputs=1), request(priority=1)]
    expected = drain(filled(*requests))
    queue = filled(*requests)
    taken = [queue.pop() for _ in range(4)]
    queue.put_back([entry for entry in taken if entry is not None])
    assert drain(queue) == expected


def test_discarded_requests_are_never_met_and_leave_memory() -> None:
    requests = [request(tenant) for tenant in "ab" * 500]
    queue = filled(*requests)
    for entry in requests[:-2]:
        queue.discard(entry)
    held = sum(len(tenant.requests) for tenant in queue._classes[0].tenants.values())
    assert held < 200
    assert drain(queue) == requests[-2:]


def test_tenants_that_are_gone_are_forgotten() -> None:
    queue = WaitingQueue()
    for index in range(1000):
        queue.push(request("stays"))
        queue.push(request(f"tenant-{index}"))
        for _ in range(2):
            entry = queue.pop()
            assert entry is not None
            queue.charge(entry, 1)
    assert len(queue._classes[0].tenants) < 300


def test_the_load_counts_what_is_as_important_of_the_tenant_and_of_all() -> None:
    requests = [request("a", tokens=3), request("a", priority=2), request("b", tokens=2), request("b", priority=1)]
    queue = filled(*requests)
    assert queue.highest_priority() == 2

    def load(tenant: str, priority: int) -> tuple[int, int, int, int]:
        own, everyone = queue.load_on(tenant, priority)
        return own.requests, own.tokens, everyone.requests, everyone.tokens

    assert load("a", 0) == (2, 4, 4, 7)
    assert load("b", 1) == (1, 1, 2, 2)
    assert load("c", 2) == (0, 0, 1, 1)
    assert load("a", 3) == (0, 0, 0, 0)
    queue.discard(requests[1])
    assert queue.highest_priority() == 1
    assert queue.pop() is requests[3]
    assert queue.highest_priority() == 0
    assert load("b", 0) == (1, 2, 2, 5)
    drain(queue)
    assert queue.highest_priority() is None
    assert load("a", 0) == (0, 0, 0, 0)


def test_classes_that_were_only_cancelled_leave_nothing() -> None:
    queue = filled(request())
    for priority in range(1, 100):
        entry = request(priority=priority)
        queue.push(entry)
        queue.discard(entry)
    assert len(queue._priorities) == len(queue._classes) == 1
    assert queue.highest_priority() == 0
