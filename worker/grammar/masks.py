"""The masks of one step: filled by the grammar thread while the model runs, waited for by sampling."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from worker.step import Int32Array, RowStatus, StepOutput


class StepMasks:
    """What the constrained rows of one step may choose.

    `places` int32 [C] are indices into the step's sampling rows. Row c of the bits belongs to the grammar thread until it is filled
    or given up, then to the launch thread.
    """

    def __init__(self, places: Int32Array, words: int, patience: float) -> None:
        self.places = places
        self._patience = patience
        self.bits: Int32Array = np.zeros((places.size, words), np.int32)
        self._pending: npt.NDArray[np.bool_] = np.ones(places.size, np.bool_)
        self._compiling: npt.NDArray[np.bool_] = np.zeros(places.size, np.bool_)
        self._late: npt.NDArray[np.bool_] = np.zeros(places.size, np.bool_)
        self.changed = threading.Condition()

    def wait(self) -> Int32Array:
        """int32 [C, vocab / 32], one bit a token, the lowest first; all zero where nothing may be chosen.

        Waits for rows whose grammar is compiled: for the result of the step before and for one mask. The others have `patience`
        seconds from then on; after that they are late.
        """
        with self.changed:
            self.changed.wait_for(lambda: not (self._pending & ~self._compiling).any())
            self.changed.wait_for(lambda: not self._pending.any(), self._patience)
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

    def compiling(self, place: int) -> None:
        """A row's grammar is being compiled."""
        self._compiling[place] = True
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
