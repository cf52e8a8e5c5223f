"""Which sequences get nothing though they should: the router's last word on a scheduler that forgets one. Sans I/O.

A sequence that its scheduler has planned, or that can't be in its queue because nothing is, has to get tokens. To wait in the queue
is no stall, be it again, after a preemption or the loss of a worker: its scheduler says so. A false alarm costs little: the sequence
keeps its age, and what its scheduler has computed is in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from router.request import Sequence

_LOOKS = 4  # in the time after which it is a stall
_MAX_DOUBLINGS = 4
# Tokens that even a slow CPU computes in a second: a long prompt has so much more time for its first token.
_SLOWEST_PREFILL = 100.0


class StallWatch:
    """Looks at each running sequence a few times in `stall_s` seconds, in the order in which they are due: O(1) for each look."""

    def __init__(self, stall_s: float) -> None:
        """`stall_s`: 0 looks at none."""
        self._stall_s = stall_s
        self._due: dict[Sequence, float] = {}  # by time, because every look is due the same time after the last one
        self._awake_since = 0.0

    def add(self, sequence: Sequence, now: float) -> None:
        """It was submitted."""
        sequence.planned = sequence.computed = False
        sequence.progress_at = now
        self._look_later(sequence, now)

    def discard(self, sequence: Sequence) -> None:
        """It runs there no more."""
        self._due.pop(sequence, None)

    def excuse(self, now: float) -> None:
        """Our own loop stood still: nobody could get anything."""
        self._awake_since = now

    def take_due(self, now: float) -> Iterator[Sequence]:
        """The sequences that are to be looked at now."""
        while self._due:
            sequence, due_at = next(iter(self._due.items()))
            if due_at > now:
                return
            del self._due[sequence]
            self._look_later(sequence, now)
            yield sequence

    def quiet_too_long(self, sequence: Sequence, waiting: int, now: float) -> float:
        """Seconds without progress, if those are too many; else 0. `waiting`: requests that wait at its scheduler."""
        if waiting and not sequence.planned:
            return 0.0
        limit = self._stall_s * 2.0 ** min(sequence.stalls, _MAX_DOUBLINGS)
        if not sequence.computed:
            known = sequence.request.spec.num_prompt_tokens + len(sequence.output.token_ids)
            limit += known / _SLOWEST_PREFILL
        quiet = now - max(sequence.progress_at, self._awake_since)
        return quiet if quiet > limit else 0.0

    def _look_later(self, sequence: Sequence, now: float) -> None:
        if self._stall_s:
            self._due.pop(sequence, None)
            self._due[sequence] = now + self._stall_s / _LOOKS
