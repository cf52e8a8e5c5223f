"""Matrix products of few rows as operations: the matrix-vector kernels, alone or with what surrounds them, and the tensor-core ones.

Which of them takes a number of rows, `fits_*` say.
"""

from __future__ import annotations

import torch
from cuda.core import Stream

from kernels.launcher import Argument, Float, Int, KernelLibrary, TensorMap
from kernels.operands import NormInput, Parts, Placing, at
from kernels.product_rows import MATVEC_ROWS, PARTS_ROWS, cublas_rows
from kernels.shapes import (
    FUSED_ROWS,
    GEMM_THREADS,
    GEMM_TILES,
    NORM_KERNELS,
    KernelShape,
    gemm_splits,
    gemm_tile,
    matvec_shared_bytes,
    matvec_warps,
    normed_shared_bytes,
)
from kernels.tensor_map import gate_up_tiles, tile_map

Tensor = torch.Tensor


class ProductOps:
    """The products of one model on one stream."""

    def __init__(
        self, library: KernelLibrary, shape: KernelShape, stream: Stream, multiprocessors: int, matvec_depth: int
    ) -> None:
        self._library = library
        self._shape = shape
        self._stream = stream
        self._depth = matvec_depth
        self._multiprocessors = multiprocessors
        # Two blocks a multiprocessor stream weights; a third place is left for the next kernel's first copies.
        self._matvec_blocks = 2 * multiprocessors
        for k in {shape.hidden_size, shape.q_size, shape.intermediate_size}:
            for rows in (8, 16):
                name = f"matvec-{k}-{rows}"
                if name in library:
                    for kernel in ("matvec", "matvec_float", "matvec_silu"):
                        library.allow_shared(name, kernel, matvec_shared_bytes(k, rows, matvec_depth))
        self._maps: dict[tuple[int, ...], TensorMap] = {}  # by what a descriptor holds: address, sizes and tile
        self._gemm_tiles = [tile for tile in GEMM_TILES if tile.name in library]
        for tile in self._gemm_tiles:
            for kernel in ("gemm_parts", "gemm_float", "gemm_silu"):
                library.allow_shared(tile.name, kernel, tile.shared_bytes)
        for rows in (8, 16):
            if f"fused-{rows}" in library:
                shared = matvec_shared_bytes(shape.hidden_size, rows, matvec_depth)
                library.allow_shared(f"fused-{rows}", "matvec_qkv", shared)
        if "fused-8" in library:
            for kernel in NORM_KERNELS:
                shared = normed_shared_bytes(shape.hidden_size, FUSED_ROWS, matvec_depth)
                library.allow_shared("fused-8", kernel, shared)

    def fits_matvec(self, k: int, tokens: int) -> bool:
        """Whether the matrix-vector kernel takes a product of `tokens` rows over `k` columns."""
        return tokens <= MATVEC_ROWS and f"matvec-{k}-8" in self._library

    def fits_fused(self, tokens: int) -> bool:
        """Whether the products that normalise their input themselves take `tokens` rows."""
        return tokens <= FUSED_ROWS and "fused-8" in self._library

    def fits_qkv(self, tokens: int) -> bool:
        """Whether matvec_qkv takes `tokens` rows."""
        return tokens <= MATVEC_ROWS and "fused-8" in self._library

    def matvec(self, weight: Tensor, x: Tensor, out: Tensor, tokens: int) -> None:
        """out = x weight^T for at most 16 tokens; `out` in the model's dtype."""
        n = weight.shape[0]
        arguments = (at(weight), at(x), at(out), Int(n), Int(tokens))
        self._matvec(weight, tokens, "matvec", -(-n // 16), *arguments)

    def matvec_float(self, weight: Tensor, x: Tensor, out: Tensor, tokens: int) -> None:
        """The same with `out` in float32, its rows out.stride(0) apart."""
        n = weight.shape[0]
        stride = Int(out.stride(0))
        self._matvec(
            weight,
            tokens,
            "matvec_float",
            -(-n // 16),
            at(weight),
            at(x),
            at(out),
            Int(n),
            Int(tokens),
            stride,
        )

    def matvec_silu(self, weight: Tensor, bias: Tensor | None, x: Tensor, out: Tensor, tokens: int) -> None:
        """out = silu(gate) * up for a weight of gate rows, then up rows."""
        n = weight.shape[0] // 2
        arguments = (at(weight), at(bias), at(x), at(out), Int(n), Int(tokens))
        self._matvec(weight, tokens, "matvec_silu", -(-n // 8), *arguments)

    def _matvec(self, weight: Tensor, tokens: int, kernel: str, blocks: int, *arguments: int | Int) -> None:
        k, rows = weight.shape[1], 8 if tokens <= 8 else 16
        blocks = min(blocks, self._matvec_blocks)
        shared = matvec_shared_bytes(k, rows, self._depth)
        self._launch(f"matvec-{k}-{rows}", kernel, (blocks,), matvec_warps(k) * 32, *arguments, shared_bytes=shared)

    def matvec_qkv(
        self,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        place: Placing,
        cache: Tensor,
        tokens: int,
    ) -> None:
        """Product, bias, rotation and append for at most 16 tokens; of place.qkv only the queries are written."""
        rows, blocks = 8 if tokens <= 8 else 16, -(-weight.shape[0] // 16)
        shared = matvec_shared_bytes(weight.shape[1], rows, self._depth)
        arguments: tuple[int | Int, ...] = (*_qkv(weight, bias, place, cache), at(x), Int(tokens))
        self._fused(f"fused-{rows}", "matvec_qkv", blocks, shared, *arguments)

    def norm_qkv(
        self,
        weight: Tensor,
        bias: Tensor | None,
        x: NormInput,
        place: Placing,
        cache: Tensor,
        tokens: int,
    ) -> None:
        """matvec_qkv of a norm, for at most 4 tokens."""
        arguments: tuple[int | Int | Float, ...]
        arguments = (*_qkv(weight, bias, place, cache), *x.arguments(), Int(tokens))
        self._normed("matvec_norm_qkv", -(-weight.shape[0] // 16), tokens, *arguments)

    def norm_silu(self, weight: Tensor, bias: Tensor | None, x: NormInput, out: Tensor, tokens: int) -> None:
        """matvec_silu of a norm, for at most 4 tokens."""
        n = weight.shape[0] // 2
        arguments = (at(weight), at(bias), at(out), Int(n), *x.arguments(), Int(tokens))
        self._normed("matvec_norm_silu", -(-n // 8), tokens, *arguments)

    def norm_float(self, weight: Tensor, x: NormInput, out: Tensor, tokens: int) -> None:
        """matvec_float of a norm, for at most 4 tokens. The new residual is not written."""
        n = weight.shape[0]
        added = (
            at(x.added),
            at(x.residual),
            at(x.bias),
            at(x.weight),
            at(x.rows),
            Float(x.epsilon),
        )
        arguments = (at(weight), at(out), Int(n), Int(out.stride(0)), *added, Int(tokens))
        self._normed("matvec_norm_float", -(-n // 16), tokens, *arguments)

    def _normed(self, kernel: str, blocks: int, tokens: int, *arguments: int | Int | Float) -> None:
        shared = normed_shared_bytes(self._shape.hidden_size, tokens, self._depth)
        self._fused("fused-8", kernel, blocks, shared, *arguments)

    def _fused(self, module: str, kernel: str, blocks: int, shared: int, *arguments: int | Int | Float) -> None:
        blocks, threads = min(blocks, self._matvec_blocks), matvec_warps(self._shape.hidden_size) * 32
        self._launch(module, kernel, (blocks,), threads, *arguments, shared_bytes=shared)

    def fits_gemm(self, tokens: int) -> bool:
        """Whether gemm_silu takes `tokens` rows."""
        return bool(self._gemm_tiles) and MATVEC_ROWS < tokens <= self._gemm_tiles[-1].rows

    def fits_parts(self, tokens: int) -> bool:
        """Whether gemm_parts and gemm_float take `tokens` rows."""
        return self.fits_gemm(tokens) and tokens <= PARTS_ROWS

    def cublas_rows(self, weight: Tensor, tokens: int, most: int) -> int:
        """How many rows, at most `most`, cuBLAS is best asked for in a product of `tokens` rows."""
        n, k = weight.shape
        # The table is of the devices and models that gemm_wgmma.cu was measured with.
        rows = cublas_rows(n, k, tokens) if self._gemm_tiles else tokens
        return rows if rows <= most else tokens

    def gemm_parts(self, weight: Tensor, x: Tensor, scratch: Tensor, tokens: int) -> Parts:
        """x weight^T for at most 64 tokens, in parts in `scratch` float32 (any shape, large enough)."""
        assert tokens <= PARTS_ROWS  # more would be written beyond the end of a scratch for so many
        n, k = weight.shape
        splits = gemm_splits(n, k)
        arguments = (self._map(weight, 128), self._rows_map(x, tokens), at(scratch), Int(n), Int(k), Int(tokens))
        self._gemm("gemm_parts", tokens, (n // 128, splits), *arguments)
        return Parts(scratch, splits)

    def gemm_silu(self, weight: Tensor, bias: Tensor | None, x: Tensor, out: Tensor, tokens: int) -> None:
        """matvec_silu for at most 128 tokens."""
        n, k = weight.shape[0] // 2, weight.shape[1]
        key = (at(weight), 2 * n, k, 0)
        if key not in self._maps:
            tiles, tile = gate_up_tiles(weight)
            self._maps[key] = self._tile_map(tiles, *tile)
        rows = self._rows_map(x, tokens)
        arguments = (self._maps[key], rows, at(bias), at(out), Int(n), Int(k), Int(tokens))
        self._gemm("gemm_silu", tokens, (min(n // 64, self._multiprocessors),), *arguments)

    def gemm_float(self, weight: Tensor, x: Tensor, out: Tensor, tokens: int) -> None:
        """matvec_float for at most 64 tokens; the weight's rows are a multiple of 128."""
        assert tokens <= PARTS_ROWS
        tiles, k = weight.shape[0] // 128, weight.shape[1]
        rows = self._rows_map(x, tokens)
        arguments = (self._map(weight, 128), rows, at(out), Int(tiles), Int(k), Int(tokens), Int(out.stride(0)))
        self._gemm("gemm_float", tokens, (min(tiles, self._multiprocessors),), *arguments)

    def sum_parts(self, parts: Parts, out: Tensor, tokens: int) -> None:
        """out [tokens, n] = the sums of a product in parts."""
        vectors = tokens * out.shape[1] // 4
        arguments = (at(parts.sums), at(out), Int(parts.splits), Int(vectors))
        self._launch(GEMM_TILES[0].name, "sum_parts", (-(-vectors // 256),), 256, *arguments)

    def _rows_map(self, x: Tensor, tokens: int) -> TensorMap:
        return self._map(x, gemm_tile(tokens).rows)

    def _map(self, matrix: Tensor, rows: int) -> TensorMap:
        key = (at(matrix), *matrix.shape, rows)
        if key not in self._maps:
            self._maps[key] = self._tile_map(matrix, rows)
        return self._maps[key]

    def _tile_map(self, tensor: Tensor, *tile: int) -> TensorMap:
        return tile_map(tensor, *tile)

    def _gemm(self, kernel: str, tokens: int, grid: tuple[int, ...], *arguments: Argument) -> None:
        tile = gemm_tile(tokens)
        self._launch(tile.name, kernel, grid, GEMM_THREADS, *arguments, shared_bytes=tile.shared_bytes)

    def _launch(
        self,
        module: str,
        kernel: str,
        grid: tuple[int, ...],
        block: int,
        *arguments: Argument,
        shared_bytes: int = 0,
    ) -> None:
        self._library.launch(self._stream, module, kernel, grid, block, *arguments, shared_bytes=shared_bytes)


def _qkv(weight: Tensor, bias: Tensor | None, place: Placing, cache: Tensor) -> tuple[int, ...]:
    tensors = (weight, bias, place.cos, place.sin, place.positions, place.slots, place.qkv, cache)
    return (*map(at, tensors), cache.stride(0))
