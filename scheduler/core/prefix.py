"""Names of blocks by content: a SHA-256 chain, so that equal hashes mean equal keys and values.

A block's hash covers everything that its keys and values depend on: the seed (how hashes are made, block size, model,
KV dtype, adapter, and the tenant's salt, which says who may share it) and, through its parent's hash, all token ids up
to its end. SHA-256 rather than a fast hash: a collision would show one tenant another's text.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from dataclasses import dataclass, field
from functools import lru_cache

from scheduler.core.block_pool import BlockPool
from scheduler.core.request import Int32Array, Request
from scheduler.core.settings import WorkerSpec


def hash_seed(spec: WorkerSpec, request: Request) -> bytes:
    """The parent of a request's first block on workers of this spec: 32 bytes."""
    parts = (spec.model_digest, spec.kv_dtype.encode(), request.adapter.encode(), request.cache_salt)
    return _hash_parts(spec.hash_version, spec.block_size, parts)


@lru_cache(maxsize=1024)  # most requests start where others did
def _hash_parts(hash_version: int, block_size: int, parts: tuple[bytes, ...]) -> bytes:
    hasher = hashlib.sha256()
    hasher.update(struct.pack("<II", hash_version, block_size))
    for part in parts:  # each with its length, so that no two lists of parts read the same
        hasher.update(struct.pack("<Q", len(part)))
        hasher.update(part)
    return hasher.digest()


def block_bytes(token_ids: Int32Array) -> bytes:
    """What is hashed of token ids, of any shape: 4 bytes each, little-endian, in order."""
    ids = token_ids if sys.byteorder == "little" else token_ids.byteswap()
    return ids.tobytes()


def num_block_bytes(block_size: int) -> int:
    """Length of the block_bytes of one block."""
    return 4 * block_size


@dataclass(slots=True)
class HashChain:
    """Hashes of a request's leading full blocks, made as they are needed and each once."""

    seed: bytes
    block_size: int
    hashes: list[bytes] = field(default_factory=list)

    def extend(self, token_ids: Int32Array, num_blocks: int) -> list[bytes]:
        """The first `num_blocks` hashes at least. `token_ids` is int32 [at least num_blocks * block_size]."""
        if len(self.hashes) < num_blocks:
            size, width = self.block_size, num_block_bytes(self.block_size)
            content = block_bytes(token_ids[len(self.hashes) * size : num_blocks * size])
            for begin in range(0, len(content), width):
                self.append(content[begin : begin + width])
        return self.hashes

    def append(self, block: bytes) -> bytes:
        """The hash of one more full block, given its block_bytes: 32 bytes."""
        parent = self.hashes[-1] if self.hashes else self.seed
        name = hashlib.sha256(parent + block).digest()
        self.hashes.append(name)
        return name


def chain_for(spec: WorkerSpec, request: Request) -> HashChain:
    """The request's chain on workers of this spec; workers that name blocks alike share it."""
    seed = hash_seed(spec, request)
    chain = request.hash_chains.get(seed)
    if chain is None:
        chain = request.hash_chains[seed] = HashChain(seed, spec.block_size)
    return chain


def num_cached_blocks(spec: WorkerSpec, pool: BlockPool, hashes: list[bytes]) -> int:
    """Leading blocks of `hashes` that need not be computed on this worker.

    Under a sliding window only the blocks that the next position still reads must be there.
    """
    if spec.window is None:
        for index, name in enumerate(hashes):
            if pool.lookup(name) is None:
                return index
        return len(hashes)
    best = run = 0
    for index, name in enumerate(hashes):
        run = run + 1 if pool.lookup(name) is not None else 0
        num_blocks = index + 1
        if run >= num_blocks - spec.first_live_block(num_blocks * spec.block_size):
            best = num_blocks
    return best
