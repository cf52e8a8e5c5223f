"""What the GPU tests share: operations for a shape on the current stream, errors against a reference, paged caches.

Whatever makes tensors takes the device: "cuda", or "cpu" for the same checks of the same kernels under tests/emulator, where the
tensors have guards around them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from cuda.core import Device, Stream

from kernels.cache import CubinCache, default_directory
from kernels.compiler import Compiler, architecture_of
from kernels.launcher import KernelLibrary
from kernels.ops import KernelOps
from kernels.shapes import GEMM_TILES, WGMMA_ARCHITECTURE, KernelShape, gemm_spec, kernel_specs
from tests.emulator.guards import guarded

BLOCK = 16


def make_shape(
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    hidden: int = 512,
    wide: int = 1024,
    qk_norm: bool = False,
    split: int = 256,
    few_split: int = 128,
) -> KernelShape:
    return KernelShape(hidden, wide, heads, kv_heads, head_dim, BLOCK, qk_norm, False, split, few_split)


def make_ops(shape: KernelShape) -> KernelOps:
    Device(0).set_current()
    properties = torch.cuda.get_device_properties(0)
    architecture = architecture_of(properties.major, properties.minor)
    compiler = Compiler(architecture, CubinCache(default_directory()))
    depth = 8 if Device(0).properties.max_shared_memory_per_block_optin >= 160 * 1024 else 4
    specs = kernel_specs(shape, depth, architecture)
    if architecture == WGMMA_ARCHITECTURE:
        # Also for shapes that its table leaves to cuBLAS.
        specs |= {tile.name: gemm_spec(tile, {}) for tile in GEMM_TILES}
    library = KernelLibrary(compiler, specs, 0, overlap=properties.major >= 9)
    stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
    return KernelOps(library, shape, stream, properties.multi_processor_count, depth)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the norm; infinite where `out` holds NaN."""
    difference = float((out.float() - expected.float()).norm() / expected.float().norm())
    return difference if difference == difference else float("inf")


def on(device: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU on the device."""
    return guarded(tensor) if device == "cpu" else tensor.to(device)


def random(*size: int, seed: int = 0, scale: float = 1.0, device: str = "cuda") -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    made = (torch.randn(size, device=device, generator=generator) * scale).to(torch.bfloat16)
    return guarded(made) if device == "cpu" else made


def ints(values: object, device: str = "cuda") -> torch.Tensor:
    return on(device, torch.tensor(values, dtype=torch.int32))


def poisoned(*size: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    made = torch.full(size, float("nan"), dtype=dtype, device=device)
    return guarded(made) if device == "cpu" else made


def makers(device: str) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """`random`, `ints` and `poisoned` of one device."""
    return partial(random, device=device), partial(ints, device=device), partial(poisoned, device=device)


class PagedRows:
    """Rows with random keys and values in shuffled blocks of a cache whose other slots are NaN."""

    def __init__(
        self, lengths: list[int], kv_heads: int, head_dim: int, seed: int = 0, window: int = 0, device: str = "cuda"
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        self.device = device
        counts = [-(-length // BLOCK) for length in lengths]
        order = torch.randperm(sum(counts) + 7, generator=generator).tolist()
        self.cache = poisoned(2, sum(counts) + 7, kv_heads, BLOCK, head_dim, device=device)
        self.block_table = on(
            device, torch.full((len(lengths) + 3, max(counts) + 2), sum(counts) + 6, dtype=torch.int32)
        )
        self.rows = on(device, torch.randperm(len(lengths) + 3, generator=generator)[: len(lengths)].to(torch.int32))
        self.keys, self.values = [], []
        for i, length in enumerate(lengths):
            blocks = [order.pop() for _ in range(counts[i])]
            self.block_table[int(self.rows[i]), : counts[i]] = ints(blocks, device)
            keys = random(length, kv_heads, head_dim, seed=seed * 1000 + 2 * i, device=device)
            values = random(length, kv_heads, head_dim, seed=seed * 1000 + 2 * i + 1, device=device)
            live = range(max(0, length - window) if window else 0, length)  # a window's past is freed: NaN
            for block in range(counts[i]):
                first, end = max(block * BLOCK, live.start), min(block * BLOCK + BLOCK, length)
                if first < end:
                    place = slice(first - block * BLOCK, end - block * BLOCK)
                    self.cache[0, blocks[block], :, place] = keys[first:end].transpose(0, 1)
                    self.cache[1, blocks[block], :, place] = values[first:end].transpose(0, 1)
            self.keys.append(keys)
            self.values.append(values)

    def attention(self, i: int, queries: torch.Tensor, first: int, window: int) -> torch.Tensor:
        """float32 reference for queries [n, heads, head_dim] at positions first .. first + n - 1 of row i."""
        group = queries.shape[1] // self.keys[i].shape[1]
        keys = self.keys[i].float().repeat_interleave(group, 1)
        values = self.values[i].float().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", queries.float(), keys) / queries.shape[2] ** 0.5
        position = torch.arange(first, first + len(queries), device=queries.device)[:, None]
        key = torch.arange(len(keys), device=queries.device)[None, :]
        hidden = (key > position) | ((key <= position - window) if window else torch.zeros_like(key > position))
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
