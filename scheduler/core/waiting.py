"""The waiting queue of one model: priority classes, fair between tenants, first come first served within a tenant.

Fairness counts tokens, not requests: the Virtual Token Counter of "Fairness in Serving Large Language Models" (Sheng et
al., OSDI 2024). Each tenant has a counter of the tokens it was served; the lowest goes next. A tenant that comes back
after idling is lifted to the lowest counter among those that wait, so that idling saves up nothing. Requests that were
served before (preempted, migrated, resumed) go first in their class, oldest first: they have clients in mid-stream.
Prompts are charged when they are placed; outputs every few steps while there is a choice between tenants, and when they leave
their row. Were they charged then only, a tenant would look cheap while its rows run, and tenants would take all rows by turns.

A bounded queue that one tenant could fill would keep the others out of it and the counters idle. So a newcomer is measured by the
mean of what its tenant and all tenants have waiting: alone, a tenant may fill the queue; several share up to twice as much, none
of them more than its part, and whoever has less is let in. Requests of lower priority don't count, or they would keep out those that
they should make way for. `load_on` gives the numbers, Scheduler.submit holds them against the bounds.

Every operation is O(log) amortised. A cancelled request stays where it is until it is met or until the dead outnumber the living.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from scheduler.core.request import Request, RequestState

COMPACT_ABOVE = 64
"""Dead entries that are never worth a compaction."""


@dataclass(slots=True)
class Amount:
    """Requests that wait, and their known tokens with what counts as tokens (Request.queue_size)."""

    requests: int = 0
    tokens: int = 0

    def add(self, requests: int, tokens: int) -> None:
        """Counts requests in, or out where both are negative."""
        self.requests += requests
        self.tokens += tokens


@dataclass(slots=True)
class _Tenant:
    name: str
    served: float = 0.0  # virtual time: tokens
    requests: deque[Request] = field(default_factory=deque)
    in_heap: bool = False


class _PriorityClass:
    def __init__(self) -> None:
        self.waiting = Amount()
        self.waiting_of: dict[str, Amount] = {}  # by tenant; none that is zero
        self.resumed: list[tuple[float, int, Request]] = []
        self.tenants: dict[str, _Tenant] = {}
        self.heap: list[tuple[float, str]] = []  # (served, name); an entry with an old `served` is moved when met
        self.floor = 0.0  # the lowest `served` among waiting tenants, as last seen
        self.forget_above = COMPACT_ABOVE

    def push(self, request: Request, *, at_head: bool) -> None:
        if request.resumed:
            heapq.heappush(self.resumed, (request.arrival, request.sequence, request))
            return
        tenant = self.tenants.get(request.tenant)
        if tenant is None or not tenant.in_heap:
            tenant = self._join(request.tenant)
        if at_head:
            tenant.requests.appendleft(request)
        else:
            tenant.requests.append(request)

    def count(self, tenant: str, requests: int, tokens: int) -> None:
        """Keeps `waiting` and `waiting_of` as requests of a tenant come, or leave where both numbers are negative."""
        own = self.waiting_of.setdefault(tenant, Amount())
        own.add(requests, tokens)
        self.waiting.add(requests, tokens)
        if not own.requests:
            del self.waiting_of[tenant]

    def _join(self, name: str) -> _Tenant:
        """A tenant starts to wait, at the floor or where its counter stands above it."""
        self._next_tenant()
        if name not in self.tenants:
            self._forget_idle_tenants()
            self.tenants[name] = _Tenant(name)
        tenant = self.tenants[name]
        tenant.served = max(tenant.served, self.floor)
        tenant.in_heap = True
        heapq.heappush(self.heap, (tenant.served, name))
        return tenant

    def pop(self) -> Request | None:
        while self.resumed:
            _, _, request = heapq.heappop(self.resumed)
            if request.state is RequestState.WAITING:
                return request
        tenant = self._next_tenant()
        return tenant.requests.popleft() if tenant else None

    def _next_tenant(self) -> _Tenant | None:
        """The waiting tenant with the lowest counter; its counter becomes the floor."""
        while self.heap:
            served, name = self.heap[0]
            tenant = self.tenants[name]
            while tenant.requests and tenant.requests[0].state is not RequestState.WAITING:
                tenant.requests.popleft()
            if not tenant.requests:
                heapq.heappop(self.heap)
                tenant.in_heap = False
            elif served < tenant.served:
                heapq.heapreplace(self.heap, (tenant.served, name))
            else:
                self.floor = max(self.floor, served)
                return tenant
        return None

    def charge(self, name: str, num_tokens: int) -> None:
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = _Tenant(name, served=self.floor)
        tenant.served += num_tokens

    def compact(self) -> None:
        self.resumed = [entry for entry in self.resumed if entry[2].state is RequestState.WAITING]
        heapq.heapify(self.resumed)
        for tenant in self.tenants.values():
            tenant.requests = deque(r for r in tenant.requests if r.state is RequestState.WAITING)

    def _forget_idle_tenants(self) -> None:
        """A tenant that neither waits nor is ahead of the floor is as good as new. O(1) amortised."""
        if len(self.tenants) > self.forget_above:
            self.tenants = {n: t for n, t in self.tenants.items() if t.in_heap or t.served > self.floor}
            self.forget_above = 2 * len(self.tenants) + COMPACT_ABOVE

    def __iter__(self) -> Iterator[Request]:
        for _, _, request in sorted(self.resumed, key=lambda entry: entry[:2]):
            if request.state is RequestState.WAITING:
                yield request
        for tenant in self.tenants.values():
            yield from (r for r in tenant.requests if r.state is RequestState.WAITING)


class WaitingQueue:
    """Requests of one model digest that have no row. Holds only requests in state WAITING, and dead ones yet to be met."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_tokens = 0
        self.num_under_grammar = 0
        self._num_dead = 0
        self._classes: dict[int, _PriorityClass] = {}
        self._priorities: list[int] = []  # negated, ascending: highest priority first

    def push(self, request: Request, *, at_head: bool = False) -> None:
        """Adds a request; `at_head` puts a popped one back in front of its tenant's others."""
        request.state = RequestState.WAITING
        chosen = self._classes.get(request.priority)
        if chosen is None:
            chosen = self._classes[request.priority] = _PriorityClass()
            bisect.insort(self._priorities, -request.priority)
        chosen.push(request, at_head=at_head)
        self._count(chosen, request, 1)

    def pop(self) -> Request | None:
        """The next request in order, or None. It is charged to its tenant by charge(), once it is placed."""
        for priority in list(self._priorities):
            chosen = self._classes[-priority]
            request = chosen.pop()
            if request is not None:
                self._count(chosen, request, -1)
                return request
            # Only dead entries were left, and pop() dropped them. Counters of an empty class start afresh.
            del self._classes[-priority]
            self._priorities.remove(priority)
        return None

    def put_back(self, requests: list[Request]) -> None:
        """Returns popped requests, given in the order in which they were popped, to where they stood."""
        for request in reversed(requests):
            self.push(request, at_head=True)

    def discard(self, request: Request) -> None:
        """Forgets a waiting request (cancelled or past its deadline); its entry is dropped later."""
        chosen = self._classes[request.priority]
        self._count(chosen, request, -1)
        request.state = RequestState.FINISHED
        if not chosen.waiting.requests:  # so that highest_priority() meets no crowd of empty classes
            del self._classes[request.priority]
            self._priorities.remove(-request.priority)
        self._num_dead += 1
        if self._num_dead > self.num_requests + COMPACT_ABOVE:
            for chosen in self._classes.values():
                chosen.compact()
            self._num_dead = 0

    def charge(self, request: Request, num_tokens: int) -> None:
        """Adds tokens served to the counter of the request's tenant."""
        chosen = self._classes.get(request.priority)
        if chosen is not None:
            chosen.charge(request.tenant, num_tokens)

    def highest_priority(self) -> int | None:
        """The priority of the next request, or None if none waits. O(1) but for classes that pop() has just emptied."""
        return next((-p for p in self._priorities if self._classes[-p].waiting.requests), None)

    def has_rivals(self) -> bool:
        """Whether several tenants wait in the class that is next: then the counters decide. O(1), as highest_priority()."""
        highest = self.highest_priority()
        return highest is not None and len(self._classes[highest].waiting_of) > 1

    def load_on(self, tenant: str, priority: int) -> tuple[Amount, Amount]:
        """What of this priority or a higher one waits: of the tenant, and of all. O(priorities)."""
        own, everyone = Amount(), Amount()
        for negated in self._priorities[: bisect.bisect_right(self._priorities, -priority)]:
            chosen = self._classes[-negated]
            for total, part in ((everyone, chosen.waiting), (own, chosen.waiting_of.get(tenant, Amount()))):
                total.add(part.requests, part.tokens)
        return own, everyone

    def _count(self, chosen: _PriorityClass, request: Request, sign: int) -> None:
        tokens = sign * request.queue_size
        chosen.count(request.tenant, sign, tokens)
        self.num_requests += sign
        self.num_tokens += tokens
        self.num_under_grammar += sign * request.under_grammar

    def __iter__(self) -> Iterator[Request]:
        """All waiting requests, class by class; for inspection and for failing all of them."""
        for priority in self._priorities:
            yield from self._classes[-priority]

    def num_by_priority(self) -> dict[int, int]:
        """Waiting requests of each priority, highest first."""
        counts = {-p: self._classes[-p].waiting.requests for p in self._priorities}
        return {priority: count for priority, count in counts.items() if count}
