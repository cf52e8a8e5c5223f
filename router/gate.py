"""How many requests one router holds at a time, counted from the first look at them to their last byte.

It is the first thing that a request meets, before a template or tokenizer costs anything. The bound is fair as the scheduler's is:
a newcomer is measured by the mean of what its tenant and all tenants have here, so that no tenant keeps the others out.
"""

from __future__ import annotations

from collections import Counter

from service.errors import OctavoError, Reason

_SMOOTHING = 0.1
_MIN_RETRY_MS = 100
_MAX_RETRY_MS = 30_000


class Gate:
    """Counts tenants in and out. `now` in seconds on any steady clock."""

    def __init__(self, max_requests: int) -> None:
        """`max_requests`: what one tenant alone may have here; all tenants together have at most twice as many."""
        self._max_requests = max_requests
        self._inside: Counter[str] = Counter()
        self._left_at = 0.0
        self._gap = 0.0  # seconds between requests that leave, smoothed

    @property
    def num_inside(self) -> int:
        """Requests of all tenants."""
        return self._inside.total()

    def enter(self, tenant: str, now: float, *, resumed: bool) -> None:
        """Let a request in; whoever called must call `leave`. Raises QUEUE_FULL, but never for a resume: that was let in before."""
        everyone = self._inside.total()
        if not resumed and self._inside[tenant] + everyone >= 2 * self._max_requests:
            retry_after_ms = self._retry_after_ms(everyone, now)
            message = f"this router holds as many requests as it takes, retry after {retry_after_ms / 1e3:.2f} s"
            raise OctavoError(Reason.QUEUE_FULL, message, retry_after_ms=retry_after_ms)
        if not everyone:
            self._left_at = now
        self._inside[tenant] += 1

    def leave(self, tenant: str, now: float) -> None:
        """A request that was let in is over."""
        self._inside[tenant] -= 1
        if not self._inside[tenant]:
            del self._inside[tenant]
        self._gap += _SMOOTHING * (now - self._left_at - self._gap)
        self._left_at = now

    def _retry_after_ms(self, everyone: int, now: float) -> int:
        """The time in which a tenth of them leaves, as they have left so far."""
        gap = max(self._gap, now - self._left_at)
        return round(min(_MAX_RETRY_MS, max(_MIN_RETRY_MS, gap * 1e3 * max(1.0, everyone / 10))))
