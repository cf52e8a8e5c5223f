"""How many requests a router holds, and what it tells those that it doesn't take."""

from __future__ import annotations

import pytest

from router.gate import Gate
from service.errors import OctavoError, Reason


def refused(gate: Gate, tenant: str, now: float = 0.0) -> int:
    """The time to come again in milliseconds; 0: it is in."""
    try:
        gate.enter(tenant, now, resumed=False)
    except OctavoError as error:
        assert error.reason is Reason.QUEUE_FULL
        return error.retry_after_ms
    return 0


def test_a_tenant_that_floods_leaves_room_for_others() -> None:
    gate = Gate(6)
    inside = {tenant: sum(refused(gate, tenant) == 0 for _ in range(50)) for tenant in "abc"}
    assert inside == {"a": 6, "b": 3, "c": 2}
    gate.leave("c", 1.0)
    assert refused(gate, "a", 1.0) > 0
    assert refused(gate, "c", 1.0) == 0


def test_a_resume_is_never_refused_and_counts() -> None:
    gate = Gate(1)
    for _ in range(3):
        gate.enter("a", 0.0, resumed=True)
    assert refused(gate, "a") > 0
    for _ in range(3):
        gate.leave("a", 1.0)
    assert gate.num_inside == 0
    assert refused(gate, "a", 1.0) == 0


def test_the_time_to_come_again_follows_the_rate_at_which_they_leave() -> None:
    gate, now = Gate(40), 1000.0
    for _ in range(300):
        while refused(gate, "a", now) == 0:
            pass
        now += 0.25
        gate.leave("a", now)
    assert refused(gate, "a", now) == 0
    assert refused(gate, "a", now) == pytest.approx(250 * 4, rel=0.1)
    assert refused(gate, "a", now + 3) == pytest.approx(3000 * 4, rel=0.1)  # nobody has left for so long
    assert refused(gate, "a", now + 3000) == 30_000
