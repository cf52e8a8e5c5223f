"""The paged KV cache: keys and values of every layer in blocks.

    slot = block_id * block_size + position % block_size

In each layer every head of the keys, then every head of the values, owns one run of blocks: keys [num_blocks, head_dim,
block_size], so that the same dimension of neighbouring positions lies side by side, values [num_blocks, block_size, head_dim].
worker/cpu/ writes and reads them; a place that its sequence has not written is never used, so a block needs no clearing when it
changes hands.
"""

from __future__ import annotations

import torch


class PagedKVCache:
    """Keys and values of all layers. With `poison` every place starts as NaN: a read of something unwritten shows up in the logits."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        poison: bool = False,
    ) -> None:
        self.block_size = block_size
        self.head_stride = num_blocks * block_size * head_dim  # numbers of one head's keys or values in one layer
        # Never zeroed: the system then backs only the blocks that have been written.
        self._data = torch.empty((num_layers, 2, num_kv_heads, self.head_stride), dtype=dtype)
        if poison:
            self._data.fill_(float("nan"))
        # Indexing a tensor for its address takes longer than a short row's attention.
        self._start = self._data.data_ptr()
        self._run_bytes = num_kv_heads * self.head_stride * dtype.itemsize  # of a layer's keys, or values

    def keys_at(self, layer: int) -> int:
        """Address of a layer's keys."""
        return self._start + 2 * layer * self._run_bytes

    def values_at(self, layer: int) -> int:
        """Address of a layer's values."""
        return self._start + (2 * layer + 1) * self._run_bytes
