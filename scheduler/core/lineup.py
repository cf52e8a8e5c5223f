"""What does not change from token to token of the rows of a step: looked up once for all steps of the same rows.

A step costs by the call of numpy, not by the row: two thirds of its calls would find what they found a step ago.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scheduler.core.plan import BoolArray, Int64Array, UInt8Array
from scheduler.core.request import Int32Array
from scheduler.core.rows import Rows


@dataclass(frozen=True, slots=True)
class Sampled:
    """What apply.py must know of S rows that sample."""

    rows: Int64Array
    """int64 [S]."""
    handles: Int64Array
    router_ids: Int64Array
    router_id: int | None
    """Of all of them, if it is one."""
    num_prompt: Int64Array
    limit: Int64Array
    min_total: Int64Array
    stop_token_ids: Int32Array
    """int32 [width, S]."""


def look_up(rows: Rows, which: Int64Array) -> Sampled:
    """Of the rows `which`, int64 [S]."""
    router_ids = rows.router_id[which]
    first = int(router_ids[0]) if which.size else 0
    return Sampled(
        rows=which,
        handles=rows.handle[which],
        router_ids=router_ids,
        router_id=first if np.count_nonzero(router_ids != first) == 0 else None,
        num_prompt=rows.num_prompt[which],
        limit=rows.limit[which],
        min_total=rows.min_total[which],
        stop_token_ids=rows.stop_token_ids.take(which, axis=1),  # take: a third of what indexing costs here
    )


@dataclass(slots=True)
class Lineup:
    """R rows that each compute and sample one token in every step, until rows come or go or one reaches its limit.

    Its arrays go out with plans and events: nobody writes them.
    """

    version: int
    """Rows.version at which it was made: while it stays, the same requests stand in the same rows."""
    steps_left: int
    """Steps until a row's last token is sampled: then the row computes no more, though it is still there."""
    rows: Int64Array
    rows32: Int32Array
    ones: Int64Array
    ones32: Int32Array
    ones8: UInt8Array
    places: Int64Array
    """0 to R - 1."""
    places32: Int32Array
    generation: Int64Array
    is_member: BoolArray
    """[max_rows]."""
    sampled: Sampled

    def holds(self, rows: Rows) -> bool:
        """Whether the next step is one of these rows."""
        return self.steps_left > 0 and self.version == rows.version


def line_up(rows: Rows, which: Int64Array) -> Lineup:
    """Of rows that have just been planned, each for one token that samples."""
    places, ones = np.arange(which.size), np.ones(which.size, np.int64)
    is_member = np.zeros(rows.spec.max_rows, np.bool_)
    is_member[which] = True
    lineup = Lineup(
        version=rows.version,
        steps_left=int((rows.last[which] - rows.num_computed[which]).min(initial=rows.spec.max_model_len)),
        rows=which,
        rows32=which.astype(np.int32),
        ones=ones,
        ones32=ones.astype(np.int32),
        ones8=ones.astype(np.uint8),
        places=places,
        places32=places.astype(np.int32),
        generation=rows.generation[which],
        is_member=is_member,
        sampled=look_up(rows, which),
    )
    for shared in (lineup.rows, lineup.rows32, lineup.ones32, lineup.ones8, lineup.places32, lineup.sampled.handles):
        shared.setflags(write=False)  # they leave the core
    return lineup
