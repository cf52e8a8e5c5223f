"""Matrix products of float32 activations with weights in the layout that the CPU reads fastest (worker/cpu/product.py).

Weights stay in bfloat16 where they are, all else becomes float32; nothing is rounded.
"""

from __future__ import annotations

import functools
import threading

import torch
from llvmlite import ir

from worker.cpu.compiler import Kernels, has_feature
from worker.cpu.product import COLUMNS, add_product, tails, tile_rows

_BLOCK_ROWS = 128  # a panel is read again for the next block
_BLOCK_FLOATS = 262_144  # 1 MiB: a thread's copy of a block's activations stays in its level 2 cache
_local = threading.local()


class Linear:
    """y = x W^T + b for float32 x [rows, in] and y [rows, out]; the weight [out, in] is not needed after construction."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._out, self._in = weight.shape
        self._panels = _pack(weight)
        self._tile = tile_rows(has_feature("avx512f"))
        self._kernel = _kernel(self._panels.dtype == torch.bfloat16, self._tile)
        self._bias = torch.zeros(len(self._panels) * COLUMNS)
        if bias is not None:
            self._bias[: self._out] = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # Whole tiles and whole panels are written; the caller sees a view of what it asked for.
        padded = -(-max(len(x), 1) // self._tile) * self._tile
        y = torch.empty(padded, len(self._bias))
        x = x.contiguous()
        block = max(self._tile, min(_BLOCK_ROWS, _BLOCK_FLOATS // self._in // self._tile * self._tile))
        for start in range(0, len(x), block):
            self._product(x[start : start + block], y[start:])
        result = y[: len(x), : self._out]
        return result if self._out == len(self._bias) else result.contiguous()

    def _product(self, x: torch.Tensor, y: torch.Tensor) -> None:
        panels = self._panels
        full = (len(x) - 1) // self._tile
        tail = next(rows for rows in tails(self._tile) if rows >= len(x) - full * self._tile)
        threads = min(torch.get_num_threads(), len(panels))
        scratch = _scratch(threads * (full * self._tile + tail) * self._in)
        arguments = (
            x.data_ptr(),
            panels.data_ptr(),
            self._bias.data_ptr(),
            y.data_ptr(),
            len(x),
            full,
            tail,
            self._in,
            len(panels),
            scratch.data_ptr(),
        )
        self._kernel.launch("product", arguments, threads)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """Panels [count, in, 32] of a weight [out, in]; in bfloat16 columns j and j + 16 lie beside each other."""
    out, inputs = weight.shape
    narrow = weight.dtype == torch.bfloat16
    count = -(-out // COLUMNS)
    rows = torch.zeros(count * COLUMNS, inputs, dtype=torch.bfloat16 if narrow else torch.float32)
    rows[:out] = weight
    if narrow:
        return rows.view(count, 2, 16, inputs).permute(0, 3, 2, 1).reshape(count, inputs, COLUMNS).contiguous()
    return rows.view(count, COLUMNS, inputs).transpose(1, 2).contiguous()


def _scratch(floats: int) -> torch.Tensor:
    """Memory for at least so many floats, kept for the calling thread's next product."""
    held: torch.Tensor | None = getattr(_local, "scratch", None)
    if held is None or len(held) < floats:
        held = _local.scratch = torch.empty(floats)
    return held


@functools.cache
def _kernel(narrow: bool, tile: int) -> Kernels:
    module = ir.Module("product")
    add_product(module, "product", narrow, tile)
    return Kernels(str(module), ["product"])
