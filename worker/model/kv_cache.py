"""The paged KV cache: keys and values of every layer in blocks.

    slot = block_id * block_size + position % block_size

In each layer every head of the keys, then every head of the values, owns one run of blocks [num_blocks + 1, block_size, head_dim]. A
read gathers whole blocks, 2 KiB or more each, in the order in which a batch of attention products wants them; a write scatters single
vectors. One block more than can be owned, the *null block*, holds zeros and stands wherever a fixed-size read reaches past what
a sequence has.
"""

from __future__ import annotations

import torch


class PagedKVCache:
    """Keys and values of all layers.

    Whoever gives a block to a sequence calls `clear`: reads take in the whole block, and what its last owner left must not come along.
    With `poison` every slot starts as NaN: a read of something unwritten then shows up in the logits instead of passing as zero.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        poison: bool = False,
    ) -> None:
        self.null_block = num_blocks
        self.block_size = block_size
        self.vectors = 2 * num_kv_heads
        self.bytes_per_slot = self.vectors * head_dim * dtype.itemsize  # in one layer
        shape = (num_layers, self.vectors, num_blocks + 1, block_size, head_dim)
        # Never zeroed as a whole: the system then backs only the blocks that have been written.
        self._data = torch.empty(shape, dtype=dtype, device=device)
        if poison:
            self._data.fill_(float("nan"))
        self._data[:, :, num_blocks] = 0
        self._slots = [layer.view(-1, head_dim) for layer in self._data]
        self._blocks = [layer.view(-1, block_size * head_dim) for layer in self._data]
        self._heads = torch.arange(self.vectors, device=device).unsqueeze(1)
        # Reused by every read: fresh memory of this size would be mapped and zeroed by the system each time.
        self._gathered = torch.empty((0, block_size * head_dim), dtype=dtype, device=device)

    def clear(self, blocks: torch.Tensor) -> None:
        """Zero the blocks [n], int64, of all layers and heads."""
        if not len(blocks):
            return
        self._data.index_fill_(2, blocks, 0)

    def slot_index(self, slots: torch.Tensor) -> torch.Tensor:
        """Where to write for int64 slots [n]: int64 [2 * num_kv_heads * n], keys of head 0 first, values last."""
        index: torch.Tensor = (self._heads * ((self.null_block + 1) * self.block_size) + slots).view(-1)
        return index

    def block_index(self, blocks: torch.Tensor) -> torch.Tensor:
        """What to read for int64 blocks [n]: int64 [2 * num_kv_heads * n], keys of head 0 first, values last."""
        index: torch.Tensor = (self._heads * (self.null_block + 1) + blocks).view(-1)
        return index

    def write(self, layer: int, index: torch.Tensor, keys_values: torch.Tensor) -> None:
        """Store keys_values [n, 2 * num_kv_heads, head_dim] in the slots of a `slot_index`."""
        data = self._slots[layer]
        vectors = keys_values.transpose(0, 1).to(data.dtype, memory_format=torch.contiguous_format)
        data.index_copy_(0, index, vectors.reshape(-1, data.shape[1]))

    def read(self, layer: int, index: torch.Tensor) -> torch.Tensor:
        """The blocks of a `block_index`: [2, num_kv_heads, n * block_size, head_dim]. Overwritten by the next read."""
        if len(index) > len(self._gathered):
            self._gathered = self._gathered.new_empty((len(index), self._gathered.shape[1]))
        blocks = torch.index_select(self._blocks[layer], 0, index, out=self._gathered[: len(index)])
        return blocks.view(2, self.vectors // 2, -1, self._slots[layer].shape[1])
