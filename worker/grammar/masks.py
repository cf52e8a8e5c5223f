"""The masks of one step: filled by the grammar thread while the model runs, waited for by sampling."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from worker.step import Int32Array, RowStatus, StepOutput


class StepMasks:
    """What the constrained rows of one step may choose.

    `places` int32 [C] are indices into the step's sampling rows. Row c of the bits belongs to the grammar thread until it is filled
    or given up, then to the launch thread.
    """

    def __init__(self, places: Int32Array, words: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.places = places
        self._clock = clock
        self.bits: Int32Array = np.zeros((places.size, words), np.int32)
        self._pending: npt.NDArray[np.bool_] = np.ones(places.size, np.bool_)
        self._compiling: npt.NDArray[np.bool_] = np.zeros(places.size, np.bool_)
        self._patience_until: npt.NDArray[np.float64] = np.zeros(places.size)
        self._late: npt.NDArray[np.bool_] = np.zeros(places.size, np.bool_)
        self.changed = threading.Condition()

    def wait(self) -> Int32Array:
        """int32 [C, vocab / 32], one bit a token, the lowest first; all zero where nothing may be chosen.

        Waits for rows whose grammar is compiled: for the result of the step before and for one mask. The others are late if by then
        their grammar's patience is at an end, or when it is.
        """
        with self.changed:
            self.changed.wait_for(lambda: not (self._pending & ~self._compiling).any())
            if self._pending.any():
                patience = float(self._patience_until[self._pending].max()) - self._clock()
                self.changed.wait_for(lambda: not self._pending.any(), max(0.0, patience))
            self._late |= self._pending
            self._pending[:] = False
        return self.bits

    @property
    def late(self) -> npt.NDArray[np.bool_]:
        """bool [C], final after `wait`: rows that must start again: their grammar is being compiled, or has to be."""
        return self._late

    def mark_late(self, output: StepOutput) -> None:
        """Say in the step's result which rows had no mask yet."""
        if self._late.any():
            status = output.row_status
            places = self.places[self._late]
            status[places[status[places] == RowStatus.MASK_EMPTY]] = RowStatus.MASK_LATE

    # ---- the grammar thread, holding `changed`

    def bits_of(self, place: int) -> Int32Array | None:
        """Where to fill in a row, int32 [vocab / 32]; None where nobody waits for it any more."""
        return self.bits[place] if self._pending[place] else None

    def filled(self, place: int) -> None:
        """A row's bits are final."""
        self._pending[place] = False
        self.changed.notify_all()

    def compiling(self, place: int, patience_until: float) -> None:
        """A row's grammar is being compiled; the row is not waited for beyond this time, on this object's clock."""
        self._compiling[place] = True
        self._patience_until[place] = patience_until
        self.changed.notify_all()

    def compiled(self, place: int) -> None:
        """It is compiled now."""
        self._compiling[place] = False

    def give_up(self, place: int, *, late: bool) -> None:
        """The row gets no token in this step."""
        if self._pending[place]:
            self.bits[place] = 0
            self._late[place] = late
            self.filled(place)
