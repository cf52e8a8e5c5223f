"""Tiles of tensors as the tensor memory accelerator fetches them (tma.cuh): descriptors that kernels take by value."""

from __future__ import annotations

import torch
from cuda.core._tensor_map import TensorMapDataType, TensorMapL2Promotion, TensorMapSwizzle  # nowhere else
from cuda.core.utils import StridedMemoryView

from kernels.launcher import TensorMap

STEP_K = 64
"""Columns of a tile: 128 bytes, which the accelerator swizzles as operands of wgmma want it."""


def tile_map(tensor: torch.Tensor, *tile: int) -> TensorMap:
    """A descriptor of tiles [*tile, 64] of a tensor of 16-bit elements, whose last dimension is contiguous.

    Holds the tensor's address, not the tensor. What lies outside comes as zeros.
    """
    view = StridedMemoryView.from_any_interface(tensor.view(torch.int16), stream_ptr=-1)
    return view.as_tensor_map(
        (*tile, STEP_K),
        data_type=TensorMapDataType.UINT16,
        swizzle=TensorMapSwizzle.SWIZZLE_128B,
        l2_promotion=TensorMapL2Promotion.L2_256B,
    )


def gate_up_tiles(weight: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """A weight [2 n, k] of gate rows, then up rows, as a tensor and its tiles: of 128 rows, eight gate rows and their eight up rows in
    turn."""
    n, k = weight.shape[0] // 2, weight.shape[1]
    return weight.view(2, n // 8, 8, k).permute(1, 0, 2, 3), (8, 2, 8)
