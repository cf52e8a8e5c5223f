"""Who brings workers down is found by halving, and nobody else pays for it."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.core import Reason, Scheduler, StepPlan, StepResult
from tests.unit.core_steps import SPEC, answer, request, scheduler_with

NONE = np.empty(0, np.int32)


class Cluster:
    """A worker whose steps fail where a poisoned request is in them; the steps that come after in flight fail, too."""

    def __init__(self, poison: set[int], **settings: object) -> None:
        self.scheduler: Scheduler = scheduler_with(SPEC, **settings)
        self.poison = poison
        self.in_flight: list[tuple[StepPlan, bool]] = []
        self.rows: dict[int, int] = {}
        self.failed: dict[int, Reason] = {}
        self.tokens: dict[int, int] = {}
        self.failures = 0

    def turn(self) -> None:
        while (plan := self.scheduler.plan(1, 0.0)) is not None:
            for row in plan.freed_rows.tolist():
                self.rows.pop(row, None)
            self.rows |= {new.row: new.request.handle for new in plan.new_rows}
            bad = any(self.rows[row] in self.poison for row in plan.rows.tolist())
            self.in_flight.append((plan, bad))
        if self.in_flight:
            plan, bad = self.in_flight.pop(0)
            if bad:
                self.failures += 1
                self.in_flight = [(later, True) for later, _ in self.in_flight]
            result = StepResult(plan.step_id, NONE, NONE, ok=False) if bad else answer(plan)
            for columns in self.scheduler.apply(1, result, 0.0):
                for handle in columns.handles.tolist():
                    self.tokens[handle] = self.tokens.get(handle, 0) + 1
        self.scheduler.check_integrity()
        self.failed |= {failed.handle: failed.reason for failed in self.scheduler.take_failed()}


@pytest.mark.parametrize("poison", [set(), {3}, {1, 2}, {0, 3, 5}])
def test_only_the_poison_fails(poison: set[int]) -> None:
    cluster = Cluster(poison)
    for handle in range(6):
        cluster.scheduler.submit(request(handle, max_tokens=4), 0.0)
    for _ in range(200):
        cluster.turn()
    assert cluster.failed == dict.fromkeys(poison, Reason.POISON)
    assert cluster.tokens == {handle: 4 for handle in range(6) if handle not in poison}
    assert cluster.scheduler.load().running == cluster.scheduler.load().waiting == 0


def test_who_lost_a_worker_is_told_and_who_was_in_its_step_is_a_suspect() -> None:
    scheduler = scheduler_with(SPEC)
    for handle in range(3):
        scheduler.submit(request(handle, max_tokens=9), 0.0)
    plan = scheduler.plan(1, 0.0)
    assert plan is not None
    named = {new.request.handle for new in plan.new_rows}
    scheduler.remove_worker(1, 0.0)
    migrated = scheduler.take_migrated()
    assert {m.handle for m in migrated if m.suspect_group} == named and len({m.suspect_group for m in migrated}) == 2
    assert all(m.failures_alone == 0 for m in migrated)
    assert scheduler.take_migrated() == []


def test_a_suspect_of_another_scheduler_runs_apart() -> None:
    scheduler = scheduler_with(SPEC)
    suspect = request(0, max_tokens=4)
    suspect.suspicion, suspect.failures_alone = 1, 4
    scheduler.submit(suspect, 0.0)
    scheduler.submit(request(1, max_tokens=4), 0.0)
    plan = scheduler.plan(1, 0.0)
    assert plan is not None and [new.request.handle for new in plan.new_rows] == [0]
    assert scheduler.plan(1, 0.0) is None  # nothing else is in flight with it
    scheduler.apply(1, StepResult(plan.step_id, NONE, NONE, ok=False), 0.0)
    assert [failed.reason for failed in scheduler.take_failed()] == [Reason.POISON]  # the fifth time alone


@pytest.mark.parametrize(("incarnations", "fails"), [([7, 7, 8, 8, 9, 9, 9], False), ([7, 8, 9, 10, 11], True)])
def test_a_worker_that_comes_again_did_not_die_of_it(incarnations: list[int], fails: bool) -> None:
    scheduler = Scheduler()
    scheduler.add_worker(1, SPEC, incarnations[0])
    scheduler.submit(request(0, max_tokens=9), 0.0)
    for number, incarnation in enumerate([*incarnations[1:], 99], 2):
        assert scheduler.plan(number - 1, 0.0) is not None
        scheduler.remove_worker(number - 1, 0.0)
        scheduler.add_worker(number, SPEC, incarnation)
    assert [failed.reason for failed in scheduler.take_failed()] == [Reason.POISON] * fails


def test_suspects_that_moved_here_are_tried_together() -> None:
    """One after the other would cost each of them, and everyone beside them, a step of its own."""
    scheduler = scheduler_with(SPEC)
    groups = {0: 7, 1: 9, 2: 7, 3: 9}
    for handle, group in groups.items():
        suspect = request(handle, max_tokens=4)
        suspect.suspicion = group
        scheduler.submit(suspect, 0.0)
    plan = scheduler.plan(1, 0.0)
    assert plan is not None and [new.request.handle for new in plan.new_rows] == [0, 2]
    scheduler.apply(1, answer(plan), 0.0)
    plan = scheduler.plan(1, 0.0)
    assert plan is not None and [new.request.handle for new in plan.new_rows] == [1, 3]


def test_a_group_stays_on_one_worker() -> None:
    """However placement would spread it: each worker that has a part of it would stand still for it."""
    scheduler = scheduler_with(SPEC)
    scheduler.add_worker(2, SPEC)
    for handle in range(4):
        suspect = request(handle, max_tokens=4)
        suspect.suspicion = 5
        scheduler.submit(suspect, 0.0)
    plan = scheduler.plan(1, 0.0)
    assert plan is not None and [new.request.handle for new in plan.new_rows] == [0, 1, 2, 3]
