"""How long the device was idle before each step, as a histogram."""

from __future__ import annotations

from bisect import bisect_left

EDGES_S = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2, 1e-1)
"""Upper edges. What lies beyond the last is a worker without requests, rather than a late plan."""


class GapHistogram:
    """Counts by EDGES_S. One thread adds; a reader of another may see a step in the sum and not yet in a count."""

    def __init__(self) -> None:
        self._counts = [0] * (len(EDGES_S) + 1)
        self.sum_ns = 0  # all gaps together

    def add(self, gap_ns: int) -> None:
        """A step that began `gap_ns` after the end of the one before."""
        self._counts[bisect_left(EDGES_S, gap_ns / 1e9)] += 1
        self.sum_ns += gap_ns

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper edge in seconds, gaps at or below it), as Prometheus wants them; the last edge is +Inf."""
        found, total = [], 0
        for edge, count in zip((*map(str, EDGES_S), "+Inf"), self._counts, strict=True):
            total += count
            found.append((edge, total))
        return found
