"""Which scheduler a request goes to: the one that most likely has its prefix cached, unless that one is too busy.

Rendezvous hashing (Thaler and Ravishankar, 1998) of tenant salt and first token ids gives each request an order of
schedulers that hardly changes when one comes or goes. Bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2018) pass over
those that already have more than their share times 1.25, a share being proportional to the workers that hold the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

PREFIX_BYTES = 256 * 4
"""The first 256 token ids of the prompt's int32 column."""
_SLACK = 1.25


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scheduler that can take the request. `in_flight`: sequences of this router that run or wait there."""

    address: str
    workers: int
    in_flight: int


def affinity(cache_salt: bytes, prompt_column: bytes) -> bytes:
    """What requests with a common prefix share."""
    return hashlib.blake2b(prompt_column[:PREFIX_BYTES], key=cache_salt[:64], digest_size=16).digest()


def choose(candidates: Sequence[Candidate], key: bytes) -> str:
    """Address of the first scheduler, in the key's order, that is within its bound. `candidates` must not be empty."""
    if len(candidates) == 1:
        return candidates[0].address
    total = sum(candidate.in_flight for candidate in candidates) + 1
    workers = sum(max(candidate.workers, 1) for candidate in candidates)
    order = sorted(candidates, key=lambda c: _score(key, c.address), reverse=True)
    for candidate in order:
        if candidate.in_flight < math.ceil(_SLACK * total * max(candidate.workers, 1) / workers):
            return candidate.address
    return order[0].address


def _score(key: bytes, address: str) -> bytes:
    return hashlib.blake2b(address.encode(), key=key, digest_size=8).digest()
