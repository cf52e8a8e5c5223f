"""LogprobColumns, unpacked and checked: both a scheduler, which cuts them apart, and a router index with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from octavo.v1 import common_pb2

from service.columns import check_range, unpack

_MAX_ENTRIES = 1 << 16  # of one position
_END = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Logprobs:
    """P positions with E entries in all; `num_entries` are at least 1 and add up to E."""

    owner: npt.NDArray[np.int32]  # [P]
    position: npt.NDArray[np.int32]  # [P]
    rank: npt.NDArray[np.int32]  # [P]
    num_entries: npt.NDArray[np.int32]  # [P]
    token_ids: npt.NDArray[np.int32]  # [E]
    logprobs: npt.NDArray[np.float32]  # [E]


def unpack_logprobs(columns: common_pb2.LogprobColumns, num_owners: int = _END, vocab_size: int = _END) -> Logprobs:
    """Raises PROTOCOL_VIOLATION, naming the column, for columns that don't fit each other or a number out of range."""
    owner = unpack("logprobs.owner", columns.owner, np.int32)
    position = unpack("logprobs.position", columns.position, np.int32, owner.size)
    rank = unpack("logprobs.rank", columns.rank, np.int32, owner.size)
    num_entries = unpack("logprobs.num_entries", columns.num_entries, np.int32, owner.size)
    check_range("logprobs.owner", owner, 0, num_owners)
    check_range("logprobs.position", position, 0, _END)
    check_range("logprobs.rank", rank, 1, _END)
    check_range("logprobs.num_entries", num_entries, 1, _MAX_ENTRIES)
    total = int(num_entries.sum(dtype=np.int64))
    token_ids = unpack("logprobs.token_ids", columns.token_ids, np.int32, total)
    check_range("logprobs.token_ids", token_ids, 0, vocab_size)
    logprobs = unpack("logprobs.logprobs", columns.logprobs, np.float32, total)
    return Logprobs(owner, position, rank, num_entries, token_ids, logprobs)
