"""When to write to clients: at once while load is light, on a timer when it is not.

A message to a client costs 26 to 55 µs whatever it holds, so a busy router must merge. Sending what is there whenever a
stream is woken doesn't merge under overload: the loop stays behind and lag grows. So time is cut into windows: the
first `burst` messages of a window leave at once, all others wait for its end, where each stream gets one message with
everything. A window is the shorter the fewer messages the one before had, so that about half of the time goes into
writing however many streams there are: a few streams get each token as it comes, though a step take but a millisecond. No
token waits longer than `interval` for its window to end; where writing takes longer than that, reading goes on between the
writes, and messages get larger, not more.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class FlushPolicy(Generic[K]):
    """Decides for each key (a stream) when it may write. Pure: `now` in seconds comes in."""

    def __init__(self, interval: float = 0.008, burst: int = 16, per_message: float = 1e-4) -> None:
        """`interval`: the longest wait in seconds; `burst`: messages of a window that leave at once; `per_message`: seconds that a
        window lasts for each message of the one before, about twice what writing one takes.
        """
        self._interval = interval
        self._burst = burst
        self._per_message = per_message
        self._window_end = float("-inf")
        self._left = 0  # messages that left in this window
        self._waiting: dict[K, None] = {}

    @property
    def due_at(self) -> float | None:
        """When to call `take`; None while nothing waits."""
        return self._window_end if self._waiting else None

    def mark(self, key: K, now: float) -> bool:
        """`key` has something to write. True: it may write now; False: it waits for the window's end."""
        if self._waiting:
            self._waiting[key] = None
            return False
        if now >= self._window_end:
            self._open(now, 0)
        if self._left < self._burst:
            self._left += 1
            return True
        self._waiting[key] = None
        return False

    def take(self, now: float) -> list[K]:
        """The window ends: all that waited, in order. They count against the next window."""
        waiting, self._waiting = list(self._waiting), {}
        self._open(now, len(waiting))
        return waiting

    def _open(self, now: float, left: int) -> None:
        self._window_end = now + min(self._interval, max(self._burst, left) * self._per_message)
        self._left = left

    def forget(self, key: K) -> None:
        """The stream is gone."""
        self._waiting.pop(key, None)
