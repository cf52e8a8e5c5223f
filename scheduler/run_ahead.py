"""How many plans a worker has in flight: so many that its device never waits for the way around. Pure: durations come in.

The way around is all that happens between two steps besides the device's work: composing and encoding a plan, the wire, launching, the
result's way back, booking it. It takes some 2 ms whatever the step holds. While one step computes, the plans behind it cover
that way only if their own steps take as long together: with steps of 3 ms two plans are enough, with steps of 1 ms it
takes three or four. More than needed would cost: whatever ends is noticed that many steps later.

The way is what a plan took beyond its own device time, where the device had waited for it: only then no other plan's time is part
of that. The least of late counts, for a result may be delayed by much else.
"""

from __future__ import annotations

import math

_MARGIN = 1.25  # ways vary
_FORGET = 1.01  # with each new look at it: the way may get longer
_WAITED = 1.1  # results so much further apart than the device's time mean that it waited
_SMOOTHING = 1 / 8


class RunAhead:
    """For one worker, from its first plan on."""

    def __init__(self, least: int, most: int) -> None:
        """`least` plans until a device time is known, and never fewer; `most` never more."""
        self._least = least
        self._most = most
        self._way_s = math.inf
        self._device_s = 0.0
        self.depth = least
        """Plans that should be in flight now."""

    def returned(self, elapsed_s: float, device_s: float, apart_s: float) -> None:
        """A result came, so long after its plan was sent and after the result before it. `device_s`: 0.0 where nobody measures it."""
        if device_s <= 0.0:
            return
        self._device_s += (device_s - self._device_s) * (_SMOOTHING if self._device_s else 1.0)
        if apart_s > _WAITED * device_s:
            self._way_s = min(self._way_s * _FORGET, max(0.0, elapsed_s - device_s))
        if self._way_s < math.inf:
            behind = math.ceil(_MARGIN * self._way_s / self._device_s)
            self.depth = min(self._most, max(self._least, 1 + behind))
