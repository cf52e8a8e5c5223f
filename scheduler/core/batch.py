"""A step while it is composed: planner.py and preemption.py fill it, commit.commit turns it into a StepPlan."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from scheduler.core.lineup import Lineup
from scheduler.core.plan import Int64Array, NewRow
from scheduler.core.rows import Rows

EMPTY = np.empty(0, np.int64)


@dataclass(slots=True)
class Batch:
    """What the rows of one worker do in its next step."""

    rows: Int64Array = field(default_factory=lambda: EMPTY)
    """int64 [R]: running rows that compute."""
    counts: Int64Array = field(default_factory=lambda: EMPTY)
    """int64 [R]: tokens that each computes."""
    append_rows: Int64Array = field(default_factory=lambda: EMPTY)
    append_blocks: Int64Array = field(default_factory=lambda: EMPTY)
    chunks: Int64Array = field(default_factory=lambda: EMPTY)
    """Indices into `rows` of those whose tokens are known, so must be sent."""
    lineup: Lineup | None = None
    """Of which `rows` are the rows, where they are one."""
    new_rows: list[NewRow] = field(default_factory=list)
    new_counts: list[int] = field(default_factory=list)
    num_tokens: int = 0
    """What all rows compute, new ones among them."""
    preempted: bool = False
    """Blocks ran out: running requests were preempted for others that run."""
    num_preempting: int = 0
    """Waiting requests that took the place of running ones of lower priority."""
    victim_priority: int | None = None
    """The highest priority among the requests that lost their place to these."""
    suspicion: int = 0
    """The group of suspects that this step is for; 0: it is for all who are under no suspicion."""
    extra_bytes: int = 0
    """What its new rows bring besides token ids."""
    completes: dict[bytes, int] = field(default_factory=dict)
    """Hash and block_id of the blocks of known tokens that this step fills."""

    @property
    def num_rows(self) -> int:
        """Rows that compute, new ones among them."""
        return self.rows.size + len(self.new_rows)

    def drop(self, row: int, rows: Rows) -> None:
        """Leaves out a running row that is about to be freed, and its blocks."""
        self.lineup = None
        kept = self.rows != row
        self.num_tokens -= int(self.counts[~kept].sum())
        is_chunk = np.zeros(self.rows.size, np.bool_)
        is_chunk[self.chunks] = True
        self.rows, self.counts, self.chunks = self.rows[kept], self.counts[kept], is_chunk[kept].nonzero()[0]
        others = self.append_rows != row
        self.append_rows, self.append_blocks = self.append_rows[others], self.append_blocks[others]
        if self.completes:
            owned = set(rows.owned_blocks(row).tolist())
            self.completes = {name: block for name, block in self.completes.items() if block not in owned}
