"""A TokenBatch, checked and taken apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from octavo.v1 import common_pb2, scheduler_pb2

from router.logprobs import PositionLogprobs, split_by_entry
from service.columns import check_range, unpack

_MAX_FINISH_REASON = max(common_pb2.FinishReason.values())


@dataclass(slots=True)
class Entry:
    """What one step made for one sequence."""

    handle: int
    first_output_index: int
    token_ids: list[int]
    finish_reason: int
    logprobs: list[PositionLogprobs] | None = None


def parse(message: scheduler_pb2.TokenBatch) -> list[Entry]:
    """The entries, in order. Raises PROTOCOL_VIOLATION, naming the column, for columns that don't fit each other."""
    handles = unpack("handles", message.handles, np.uint32)
    count = handles.size
    first = unpack("first_output_index", message.first_output_index, np.int32, count)
    sizes = unpack("num_tokens", message.num_tokens, np.int32, count)
    reasons = unpack("finish_reason", message.finish_reason, np.uint8, count)
    check_range("first_output_index", first, 0, 2**31 - 1)
    check_range("num_tokens", sizes, 0, 2**31 - 1)
    check_range("finish_reason", reasons, 0, _MAX_FINISH_REASON + 1)
    token_ids = unpack("token_ids", message.token_ids, np.int32, int(sizes.sum()))
    check_range("token_ids", token_ids, 0, 2**31 - 1)
    ids = token_ids.tolist()
    ends = np.cumsum(sizes).tolist()
    entries = [
        Entry(handle, start, ids[end - size : end], reason)
        for handle, start, size, end, reason in zip(
            handles.tolist(), first.tolist(), sizes.tolist(), ends, reasons.tolist(), strict=True
        )
    ]
    if message.HasField("logprobs"):
        for owner, positions in split_by_entry(message.logprobs, count).items():
            entries[owner].logprobs = positions
    return entries
