"""Matrix products of float32 activations with weights in the layout that the CPU reads fastest (worker/cpu/product.py).

Weights stay in bfloat16 where they are, all else becomes float32; nothing is rounded. worker/model/linear_int8.py rounds.
"""

from __future__ import annotations

import functools
import threading

import torch
from llvmlite import ir

from worker.cpu.compiler import Kernels, has_feature
from worker.cpu.product import COLUMNS, add_product, tails, tile_rows

_BLOCK_ROWS = 128  # a panel is read again for the next block
_BLOCK_WORDS = 262_144  # 1 MiB: a thread's copy of a block's activations stays in its level 2 cache
_local = threading.local()


class PackedProduct:
    """y = x W^T + b for float32 x [rows, in] and y [rows, out]. Subclasses pack the weight [out, in] into panels of 32 columns."""

    def __init__(
        self,
        shape: tuple[int, int],
        panels: torch.Tensor,  # [count, …]
        bias: torch.Tensor | None,
        kernel: Kernels,
        tile: int,
        depth: tuple[int, int],  # the kernel's measure of it, and how many of x it stands for
        row_words: int,  # 32-bit words of a thread's copy of a row of x
    ) -> None:
        self.out, self.inputs = shape
        self._panels = panels
        self._kernel = kernel
        self._tile = tile
        self._tails = tails(tile)
        self._depth, self._width = depth[0], depth[0] * depth[1]
        self._row_words = row_words
        self._block = max(tile, min(_BLOCK_ROWS, _BLOCK_WORDS // row_words) // tile * tile)
        self._bias = torch.zeros(len(panels) * COLUMNS)
        if bias is not None:
            self._bias[: self.out] = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if self._width > self.inputs:
            x = torch.nn.functional.pad(x, (0, self._width - self.inputs))
        x = x.contiguous()
        # Whole tiles and whole panels are written; the caller sees a view of what it asked for.
        padded = rows if rows in self._tails else -(-rows // self._tile) * self._tile
        columns = self._bias.shape[0]
        y = torch.empty(padded, columns)
        x_at, y_at = x.data_ptr(), y.data_ptr()
        for start in range(0, rows, self._block):
            count = min(self._block, rows - start)
            self._product(x_at + 4 * self._width * start, y_at + 4 * columns * start, count)
        if columns > self.out:
            return y[:rows, : self.out].contiguous()
        return y if padded == rows else y[:rows]

    def _product(self, x_at: int, y_at: int, rows: int) -> None:
        panels = self._panels
        full = (rows - 1) // self._tile
        tail = rows - full * self._tile
        if tail not in self._tails:
            tail = next(size for size in self._tails if size >= tail)
        count = panels.shape[0]
        threads = min(torch.get_num_threads(), count)
        memory = _scratch(threads * (full * self._tile + tail) * self._row_words)
        arguments = (
            x_at,
            panels.data_ptr(),
            self._bias.data_ptr(),
            y_at,
            rows,
            full,
            tail,
            self._depth,
            count,
            memory.data_ptr(),
        )
        self._kernel.launch("product", arguments, threads)


class Linear(PackedProduct):
    """The weight [out, in], bfloat16 or wider, is not needed after construction."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        out, inputs = weight.shape
        panels = _pack(weight)
        tile = tile_rows(has_feature("avx512f"))
        kernel = _kernel(panels.dtype == torch.bfloat16, tile)
        super().__init__((out, inputs), panels, bias, kernel, tile, (inputs, 1), inputs)


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


def _scratch(words: int) -> torch.Tensor:
    """Memory for at least so many 32-bit words, kept for the calling thread's next product."""
    held: torch.Tensor | None = getattr(_local, "scratch", None)
    if held is None or held.shape[0] < words:
        held = _local.scratch = torch.empty(words)
    return held


@functools.cache
def _kernel(narrow: bool, tile: int) -> Kernels:
    module = ir.Module("product")
    add_product(module, "product", narrow, tile)
    return Kernels(str(module), ["product"])
