"""When to try again, where, and after how long. No I/O: both clients and every kind of call use it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from octavo.client.errors import OctavoError, Reason


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits on trying again; times in seconds."""

    retries: int = 3  # of a request that has not begun, for what a router said
    resumes: int = 12  # of a stream that broke, in a row without anything new
    initial_backoff: float = 0.1  # doubles each time
    max_backoff: float = 2.0
    max_wait: float = 30.0  # told to wait longer than this, give up at once
    first_word: float = 3.0  # a router that says nothing for so long after it was dialled is left for another one


class Attempts:
    """The tries of one request over a list of routers."""

    def __init__(self, policy: RetryPolicy, num_routers: int, *, first: int = 0, deadline: float | None = None) -> None:
        """`first` is the router to begin with; `deadline` is on the caller's monotonic clock."""
        self._policy = policy
        self._num_routers = num_routers
        self._deadline = deadline
        self._failures = 0
        self.router = first % num_routers
        self.count = 0  # tries that failed so far, for GenerateRequest.attempt

    @property
    def has_alternative(self) -> bool:
        """Whether there is another router to go to."""
        return self._num_routers > 1

    @property
    def first_word(self) -> float:
        """As the policy says, seconds."""
        return self._policy.first_word

    def remaining(self, now: float) -> float | None:
        """Seconds until the deadline, None without one. Raises OctavoError (DEADLINE) once it has passed."""
        if self._deadline is None:
            return None
        if now >= self._deadline:
            raise OctavoError(Reason.DEADLINE, "the deadline of the call has passed")
        return self._deadline - now

    def progressed(self) -> None:
        """Something new arrived, so the count of failures in a row starts again."""
        self._failures = 0

    def failed(self, error: OctavoError, now: float, *, may_repeat: bool, resuming: bool = False) -> float:
        """Seconds to wait before the next try, which goes to `router`. Raises the error where there should be none."""
        self._failures += 1
        self.count += 1
        # A router that can't be reached, or that leaves, has not begun: while routers are restarted one after the other, some
        # connection is always waiting to be dialled again.
        moved = self.has_alternative and (error.broken or error.reason is Reason.DRAINING)
        limit = self._policy.resumes if resuming or moved else self._policy.retries
        # A defect on the server's side is worth one more try, not a series.
        if error.reason is Reason.INTERNAL:
            limit = min(limit, 1)
        if not may_repeat or self._failures > limit:
            raise error
        delay = self._delay(error)
        if delay > self._policy.max_wait or (self._deadline is not None and now + delay >= self._deadline):
            raise error
        self.router = (self.router + 1) % self._num_routers
        return delay

    def _delay(self, error: OctavoError) -> float:
        if error.retry_after:
            # Spread upwards only: earlier than told is useless.
            return error.retry_after * random.uniform(1.0, 1.2)
        rounds = (self._failures - 1) // self._num_routers
        if self._failures % self._num_routers != 0:
            return 0.0  # a router that was not asked in this round is asked at once
        backoff = self._policy.initial_backoff * 2.0 ** min(rounds, 30)
        return min(backoff, self._policy.max_backoff) * random.uniform(0.8, 1.2)
