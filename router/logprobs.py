"""Log-probability columns of a TokenBatch, sorted out by entry and turned into the messages that clients see."""

from __future__ import annotations

import math
from dataclasses import dataclass

from octavo.v1 import common_pb2, inference_pb2

from router.detokenize import TokenTable
from service.logprobs import unpack_logprobs


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """One token position. `token_ids` and `logprobs`: the token that stands there, then the best ones, falling."""

    position: int
    rank: int
    token_ids: list[int]
    logprobs: list[float]


def split_by_entry(columns: common_pb2.LogprobColumns, num_entries: int) -> dict[int, list[PositionLogprobs]]:
    """Positions by the entry of the batch that they belong to. Raises PROTOCOL_VIOLATION for columns that don't fit."""
    found = unpack_logprobs(columns, num_entries)
    ids, values = found.token_ids.tolist(), found.logprobs.tolist()
    by_entry: dict[int, list[PositionLogprobs]] = {}
    at = 0
    for owner, position, rank, size in zip(
        found.owner.tolist(), found.position.tolist(), found.rank.tolist(), found.num_entries.tolist(), strict=True
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
        # Infinity (minus: a masked token) is no JSON number, nor is NaN.
        logprob=logprob if -9999.0 < logprob < math.inf else -9999.0,
        rank=rank,
        text=data.decode(errors="replace"),
        bytes=data,
    )
