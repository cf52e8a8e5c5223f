"""Philox4x32-10: random numbers as a pure function of a key and a counter.

Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). No state moves: the noise of a token is
the same after preemption, on another worker or in another row. A draw is named by

    key     = the request's seed (64 bits)
    counter = (vocabulary offset / 4, output index, purpose, 0), the word at vocabulary offset % 4 being taken
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for; each purpose has its own stream."""

    SAMPLE = 0


def philox4x32(counter: UInt64Array, key: tuple[int, int]) -> UInt64Array:
    """Ten rounds over counters uint64 [4, n] that hold 32-bit words, under one key of two 32-bit words. Returns [4, n]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def uniform(
    seed: int, output_index: int, token_ids: npt.NDArray[np.int64], purpose: Purpose = Purpose.SAMPLE
) -> npt.NDArray[np.float64]:
    """One number in (0, 1), 32 bits of it random, for each of token_ids [n]."""
    groups, place = np.unique(token_ids >> 2, return_inverse=True)
    counter = np.zeros((4, len(groups)), np.uint64)
    counter[0] = groups.astype(np.uint64)
    counter[1] = output_index
    counter[2] = int(purpose)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    picked = words[token_ids & 3, place]
    numbers: npt.NDArray[np.float64] = (picked.astype(np.float64) + 0.5) * 2.0**-32
    return numbers


def gumbel(seed: int, output_index: int, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise for token_ids [n]: argmax(logit + gumbel) is a draw from softmax(logits)."""
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform(seed, output_index, token_ids)))
    return noise
