"""The values that cross the core's border: step plans out, step results in, events out. Columns are numpy arrays.

Names and dtypes are those of `protos/octavo/v1/step.proto`, so the shell encodes a plan with one `tobytes` per column.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from scheduler.core.errors import Reason
from scheduler.core.request import Int32Array, Request

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

DEAD_BLOCK = 0
"""Stands in a new row's block table where the block is behind the sliding window. It is never read."""


class RowStatus(IntEnum):
    """How one row of a step ended; the numbers of `octavo.v1.RowStatus`."""

    OK = 0
    NAN = 1
    MASK_EMPTY = 2
    MASK_LATE = 3


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request that starts, or starts again, in a row."""

    row: int
    request: Request
    token_ids: Int32Array
    """int32 [N]: known tokens up to the end of this step's chunk, those before `num_computed` included."""
    num_prompt_tokens: int
    num_computed: int
    """Tokens that the blocks hold already (a prefix hit); less than N."""
    block_ids: Int32Array
    """int32 [B]: block table for N tokens."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one worker. Applied in this order: frees, new rows, block appends, chunk tokens, forward, sample.

    R rows compute. Decode rows carry no token id: the device sampled it. A plan may be frees only (R = 0).
    """

    step_id: int
    """1, 2, 3 … since the worker was added."""
    new_rows: list[NewRow]
    freed_rows: Int32Array
    """int32 [F]. Freeing a row that holds nothing is a no-op. May be named in new_rows of the same plan."""
    rows: Int32Array
    """int32 [R], each once; new rows included."""
    num_scheduled: Int32Array
    """int32 [R], at least 1."""
    num_samples: UInt8Array
    """uint8 [R], 0 or 1. S = their sum."""
    append_rows: Int32Array
    """int32 [A]: the next block of this row is …"""
    append_block_ids: Int32Array
    """int32 [A]."""
    chunk_rows: Int32Array
    """int32 [C]: running rows that learn known tokens …"""
    chunk_lens: Int32Array
    """int32 [C]: … how many …"""
    chunk_token_ids: Int32Array
    """int32 [sum of chunk_lens]: … and which."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step made. S entries, one for each row of the plan that samples, in the plan's order."""

    step_id: int
    num_tokens: npt.NDArray[np.integer]
    """[S]: 1, or 0 where row_status isn't OK."""
    token_ids: Int32Array
    """int32 [sum of num_tokens]."""
    row_status: npt.NDArray[np.integer] | None = None
    """[S] of RowStatus; None or empty if all are OK."""
    ok: bool = True
    """False: the step failed. It and all plans in flight after it are void, and the worker has forgotten every row and block."""


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """Tokens of one step for the sequences of one router: one TokenBatch. E entries."""

    router_id: int
    handles: Int64Array
    """int64 [E]."""
    first_output_index: Int32Array
    """int32 [E]: output index of the entry's first token."""
    num_tokens: Int32Array
    """int32 [E]: 0 for an entry that only finishes or only carries prompt log-probabilities."""
    finish_reason: UInt8Array
    """uint8 [E]: FinishReason, 0 while running."""
    token_ids: Int32Array
    """int32 [sum of num_tokens]."""
    plan_index: Int32Array
    """int32 [E]: index into the plan's `rows`, which is `owner` in the result's log-probability columns."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request got a row, for the first time or again. The counts of the first time are what its client is told."""

    router_id: int
    handle: int
    cached_tokens: int
    digest: bytes
    queue_seconds: float


@dataclass(frozen=True, slots=True)
class Preempted:
    """A request gave its row to others and waits to be recomputed."""

    router_id: int
    handle: int


@dataclass(frozen=True, slots=True)
class Migrated:
    """A request has lost its worker, or a step failed, and waits to be recomputed."""

    router_id: int
    handle: int
    suspect_group: int
    """Not 0: it was in a plan that didn't come back, and is tried again together with the others of this group."""
    failures_alone: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that can't be run, or not any more. It is gone from the scheduler."""

    router_id: int
    handle: int
    reason: Reason
    message: str
