"""As many plans in flight as cover the way around, no more: a device that computes, seen from a scheduler, in simulated time."""

from __future__ import annotations

import heapq
import random

import pytest

from scheduler.run_ahead import RunAhead


def simulate(
    device_s: list[float], way_s: float, *, least: int = 2, most: int = 4, jitter: float = 0.1
) -> tuple[float, list[int]]:
    """Share of the time from the first plan to the last result in which the device computed, and the depth before each plan."""
    generator = random.Random(1)
    ahead = RunAhead(least, most)
    now, last, device_free, planned, depths = 0.0, 0.0, 0.0, 0, []
    flying: list[tuple[float, float, float]] = []  # result comes at, planned at, device time
    while planned < len(device_s) or flying:
        if planned < len(device_s) and len(flying) < ahead.depth:
            way = way_s * (1 + jitter * generator.random())
            device_free = max(device_free, now + way / 2) + device_s[planned]
            heapq.heappush(flying, (device_free + way / 2, now, device_s[planned]))
            depths.append(ahead.depth)
            planned += 1
            continue
        now, began, took = heapq.heappop(flying)
        ahead.returned(now - began, took, now - last)
        last = now
    return sum(device_s) / now, depths


@pytest.mark.parametrize(
    ("device_ms", "way_ms", "depth"), [(20.0, 3.0, 2), (2.7, 2.0, 2), (1.5, 2.0, 3), (1.0, 2.0, 4), (0.3, 2.0, 4)]
)
def test_the_device_never_waits_where_four_plans_can_cover_the_way(device_ms: float, way_ms: float, depth: int) -> None:
    share, depths = simulate([device_ms / 1e3] * 2_000, way_ms / 1e3)
    assert depths[-1] == depth
    assert share > (0.98 if 3 * device_ms >= 1.1 * way_ms else 0.45)


def test_two_are_too_few_for_short_steps() -> None:
    """What it is for: fails to be true if the simulated device were never to wait."""
    share, _ = simulate([0.001] * 2_000, 0.002, most=2)
    assert share < 0.75


def test_it_goes_back_where_steps_get_longer_and_comes_again() -> None:
    lengths = [0.001] * 500 + [0.004] * 500 + [0.001] * 500
    share, depths = simulate(lengths, 0.002)
    assert (depths[490], depths[990], depths[-1]) == (4, 2, 4)
    assert share > 0.97


def test_one_slow_result_changes_nothing() -> None:
    ahead = RunAhead(2, 4)
    for _ in range(50):
        ahead.returned(0.005, 0.003, 0.005)
    before = ahead.depth
    ahead.returned(0.500, 0.003, 0.500)
    assert ahead.depth == before == 2


def test_a_backend_that_does_not_measure_gets_the_least() -> None:
    ahead = RunAhead(2, 4)
    for _ in range(50):
        ahead.returned(0.005, 0.0, 0.005)
    assert ahead.depth == 2


def test_a_fixed_depth_stays() -> None:
    assert set(simulate([0.0005] * 300, 0.002, least=3, most=3)[1]) == {3}
