"""The paged KV cache: keys and values of every layer in blocks, addressed by slot.

    slot = block_id * block_size + position % block_size

Each layer is one matrix of vectors [2 * num_kv_heads * num_slots, head_dim]: head h of the keys owns rows
h * num_slots .. (h + 1) * num_slots, the values follow the keys. So one gather fetches what a batch of attention products
reads, in the order in which they read it. One slot more than the blocks have, the *null slot*, holds zeros and stands
wherever a fixed-size read reaches past what a sequence has written.
"""

from __future__ import annotations

import torch


class PagedKVCache:
    """Keys and values of all layers.

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
        self.num_slots = num_blocks * block_size + 1
        self.null_slot = num_blocks * block_size
        self.vectors = 2 * num_kv_heads
        # Never zeroed as a whole: the system then backs only the blocks that have been written.
        self._data = torch.empty((num_layers, self.vectors, self.num_slots, head_dim), dtype=dtype, device=device)
        if poison:
            self._data.fill_(float("nan"))
        self._data[:, :, self.null_slot] = 0
        self._layers = [layer.view(-1, head_dim) for layer in self._data]
        self._head_starts = (torch.arange(self.vectors, device=device) * self.num_slots).unsqueeze(1)

    def index(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of a layer's matrix for int64 slots [n]: int64 [2 * num_kv_heads * n], keys of head 0 first, values last."""
        index: torch.Tensor = (self._head_starts + slots).view(-1)
        return index

    def write(self, layer: int, index: torch.Tensor, keys_values: torch.Tensor) -> None:
        """Store keys_values [n, 2 * num_kv_heads, head_dim] in the slots that `index` was made of."""
        vectors = keys_values.transpose(0, 1).reshape(-1, keys_values.shape[-1])
        self._layers[layer].index_copy_(0, index, vectors)

    def read(self, layer: int, index: torch.Tensor) -> torch.Tensor:
        """The vectors [2, num_kv_heads, n, head_dim] of the slots that `index` was made of, in float32."""
        vectors: torch.Tensor = self._layers[layer].index_select(0, index)
        return vectors.float().view(2, self.vectors // 2, -1, vectors.shape[-1])
