"""The blocks of one worker: who owns them, which are free, and which can be hit by content.

A block is always in exactly one of three places:

    free     in `_free`; its content means nothing
    used     ref_count > 0; owned by that many rows
    cached   ref_count == 0 but hashed: in `_cached`, least recently used first, until a row hits it or it is evicted

so free + used + cached = total. Only full blocks are hashed and nothing writes a full block again, so rows share them as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from scheduler.core.plan import Int64Array


class BlockPool:
    """Allocation is O(blocks asked for). Blocks are evicted only when no block is free."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_count = np.zeros(num_blocks, np.int32)
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: taken from the end
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks whose content means nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody owns but that can be hit."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that allocate() can give."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that rows own."""
        return self.num_blocks - self.num_available

    def allocate(self, count: int) -> Int64Array:
        """`count` blocks with one owner, int64 [count]. The caller has checked num_available."""
        missing = count - len(self._free)
        if missing > 0:
            self._evict(missing)
        split = len(self._free) - count
        blocks = np.array(self._free[split:], np.int64)
        del self._free[split:]
        self.ref_count[blocks] = 1
        return blocks

    def release(self, blocks: Int64Array) -> None:
        """Takes one owner from each of a row's blocks, given in the order of its table.

        Freed tail first: the longest prefix of a conversation is what a later request shares, so it is evicted last.
        """
        owners = self.ref_count[blocks] - 1
        self.ref_count[blocks] = owners
        for block in blocks[owners == 0][::-1].tolist():
            if self._hash_of[block] is not None:
                self._cached[block] = None
            else:
                self._free.append(block)

    def lookup(self, block_hash: bytes) -> int | None:
        """The block that holds this content."""
        return self._block_of.get(block_hash)

    def touch(self, blocks: Sequence[int]) -> None:
        """Adds an owner to hit blocks."""
        for block in blocks:
            if self.ref_count[block] == 0:
                del self._cached[block]
            self.ref_count[block] += 1

    def num_unowned(self, blocks: Sequence[int]) -> int:
        """How many of these hits would leave num_available."""
        return sum(1 for block in blocks if block in self._cached)

    def register(self, block: int, block_hash: bytes) -> None:
        """Makes a full, owned block hittable. If another block holds the same content, that one stays the one to hit."""
        if self._hash_of[block] is None and self._block_of.setdefault(block_hash, block) == block:
            self._hash_of[block] = block_hash

    def unregister(self, blocks: Sequence[int]) -> None:
        """The content of these blocks can't be trusted: no later request may hit them."""
        for block in blocks:
            if self._hash_of[block] is not None:
                self._forget(block)
                if block in self._cached:
                    del self._cached[block]
                    self._free.append(block)

    def clear_cache(self) -> None:
        """Unregisters every block: the device has forgotten them."""
        self.unregister(list(self._block_of.values()))

    def _evict(self, count: int) -> None:
        for _ in range(count):
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self._free.append(block)

    def _forget(self, block: int) -> None:
        block_hash, self._hash_of[block] = self._hash_of[block], None
        if block_hash is not None:
            del self._block_of[block_hash]

    def check_integrity(self) -> None:
        """Raises RuntimeError if a block is in two places or in none."""
        used = int(np.count_nonzero(self.ref_count))
        places = [*self._free, *self._cached]
        if (
            len(set(places)) != len(places)
            or len(places) + used != self.num_blocks
            or (places and bool(self.ref_count[places].any()))
        ):
            raise RuntimeError(
                f"{len(self._free)} free + {used} used + {len(self._cached)} cached != {self.num_blocks}"
            )
        named = {block: name for block, name in enumerate(self._hash_of) if name is not None}
        if {block: name for name, block in self._block_of.items()} != named or not self._cached.keys() <= named.keys():
            raise RuntimeError("hashes and blocks do not match")
