"""Which rows decode under a grammar, and what their matchers have to be told when they start. Owned by the launch thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from service.grammar import Grammar
from worker.grammar.matcher import Ends, RowMatcher
from worker.step import Step

if TYPE_CHECKING:
    from worker.grammar.compiled import Start
    from worker.grammar.masks import StepMasks


@dataclass(slots=True, eq=False, weakref_slot=True)
class ConstrainedRow:
    """One request in its row. The launch thread makes it and adds outputs until it samples; then the grammar thread owns it."""

    grammar: Grammar
    ends: Ends
    num_prompt: int
    num_known: int
    outputs: list[int] = field(default_factory=list)  # of an earlier life: to be replayed
    # The grammar thread's.
    matcher: RowMatcher | None = None
    start: Start | None = None  # of which the matcher is a copy
    token_due: bool = False  # its last mask was given out, and the token has not come back
    waiting: tuple[StepMasks, int] | None = None  # the mask that can't be made yet
    # Had no mask in time: gets none any more, until the scheduler starts it again. Written by the launch thread.
    late: bool = False


class ConstrainedRows:
    """The constrained rows of a worker, by row."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = eos_token_ids
        self._rows: dict[int, ConstrainedRow] = {}

    def apply(self, step: Step) -> tuple[np.ndarray[tuple[int], np.dtype[np.int32]], list[ConstrainedRow]]:
        """Follow a step's changes. Returns the indices into its sampling rows, int32 [C], of those with a grammar, and these."""
        rows = self._rows
        if rows:
            for row in (*step.freed_rows.tolist(), *(new.row for new in step.new_rows)):
                rows.pop(row, None)
        for new in step.new_rows:
            if new.grammar is not None:
                rows[new.row] = ConstrainedRow(
                    new.grammar,
                    Ends.of(new.sampling, self._eos),
                    new.num_prompt_tokens,
                    new.token_ids.size,
                    new.token_ids[new.num_prompt_tokens :].tolist(),
                )
        if not rows:
            return np.zeros(0, np.int32), []
        first = 0
        for row, length in zip(step.chunk_rows.tolist(), step.chunk_lens.tolist(), strict=True):
            constrained = rows.get(row)
            if constrained is not None:
                outputs_from = max(0, constrained.num_prompt - constrained.num_known)
                constrained.outputs += step.chunk_token_ids[first : first + length][outputs_from:].tolist()
                constrained.num_known += length
            first += length
        sampling = step.rows[step.num_samples > 0].tolist()
        found = [(place, rows[row]) for place, row in enumerate(sampling) if row in rows]
        return np.array([place for place, _ in found], np.int32), [row for _, row in found]

    def reset(self) -> None:
        """Forget every row."""
        self._rows.clear()
