"""Log-probability columns of a TokenBatch, sorted out by entry and turned into the messages that clients see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from octavo.v1 import common_pb2, inference_pb2

from router.detokenize import TokenTable
from service.columns import check_range, unpack


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """One token position. `token_ids` and `logprobs`: the token that stands there, then the best ones, falling."""

    position: int
    rank: int
    token_ids: list[int]
    logprobs: list[float]


def split_by_entry(columns: common_pb2.LogprobColumns, num_entries: int) -> dict[int, list[PositionLogprobs]]:
    """Positions by the entry of the batch that they belong to. Raises PROTOCOL_VIOLATION for columns that don't fit."""
    owners = unpack("logprobs.owner", columns.owner, np.int32)
    count = owners.size
    positions = unpack("logprobs.position", columns.position, np.int32, count)
    ranks = unpack("logprobs.rank", columns.rank, np.int32, count)
    sizes = unpack("logprobs.num_entries", columns.num_entries, np.int32, count)
    check_range("logprobs.owner", owners, 0, num_entries)
    check_range("logprobs.position", positions, 0, 2**31 - 1)
    check_range("logprobs.rank", ranks, 1, 2**31 - 1)
    check_range("logprobs.num_entries", sizes, 1, 2**16)
    total = int(sizes.sum())
    token_ids = unpack("logprobs.token_ids", columns.token_ids, np.int32, total)
    check_range("logprobs.token_ids", token_ids, 0, 2**31 - 1)
    values = unpack("logprobs.logprobs", columns.logprobs, np.float32, total).tolist()
    ids = token_ids.tolist()
    by_entry: dict[int, list[PositionLogprobs]] = {}
    at = 0
    for owner, position, rank, size in zip(
        owners.tolist(), positions.tolist(), ranks.tolist(), sizes.tolist(), strict=True
    ):
        one = PositionLogprobs(position, rank, ids[at : at + size], values[at : at + size])
        by_entry.setdefault(owner, []).append(one)
        at += size
    return by_entry


def to_message(one: PositionLogprobs, table: TokenTable) -> inference_pb2.TokenLogprobs:
    """A position as clients see it: with each token's own text and bytes."""
    top = zip(one.token_ids[1:], one.logprobs[1:], strict=True)
    return inference_pb2.TokenLogprobs(
        token=_token(one.token_ids[0], one.logprobs[0], one.rank, table),
        top=[_token(token_id, value, rank, table) for rank, (token_id, value) in enumerate(top, 1)],
    )


def _token(token_id: int, logprob: float, rank: int, table: TokenTable) -> inference_pb2.TokenLogprob:
    data = table.token_bytes(token_id)
    return inference_pb2.TokenLogprob(
        token_id=token_id,
        # Minus infinity (a masked token) is no JSON number, nor is NaN.
        logprob=logprob if logprob > -9999.0 else -9999.0,
        rank=rank,
        text=data.decode(errors="replace"),
        bytes=data,
    )
