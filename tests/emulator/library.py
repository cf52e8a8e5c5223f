"""The kernels on this machine's processor, behind the interface by which kernels/ops.py starts them on a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from cuda.core import Stream

from kernels.launcher import Argument, KernelLibrary
from kernels.operands import DecodeItems, DecodeScratch, SharedPrefixes, StepTensors
from kernels.ops import KernelOps
from kernels.shapes import (
    GEMM_TILES,
    WGMMA_ARCHITECTURE,
    KernelShape,
    KernelSpec,
    decode_spec,
    gemm_spec,
    kernel_specs,
    truncated_spec,
)
from tests.emulator.compile import Builder, Mutation
from tests.emulator.guards import broken_guards

Tensor = torch.Tensor
_UNASKED_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel may have without asking


class EmulatorError(Exception):
    """A kernel did what it must not; the text names it, its block and what it did."""


_Previous = ctypes.CFUNCTYPE(None, ctypes.c_int)


class _Launch(ctypes.Structure):
    """emulator::Launch of cuda/emulator.h."""

    _fields_ = [
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("count", ctypes.c_int),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("kinds", ctypes.c_char_p),
        ("previous", _Previous),
    ]


class _Tensor(ctypes.Structure):
    """emulator::Tensor of cuda/emulator.h, as long as the hardware's descriptor."""

    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("box", ctypes.c_int * 5),
        ("sizes", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 5),
        ("rest", ctypes.c_uint64 * 2),
    ]


def emulated_map(tensor: Tensor, *tile: int) -> _Tensor:
    """What kernels.tensor_map.tile_map is for a device: of a tensor of 16-bit elements, and tiles [*tile, 64]."""
    assert tensor.element_size() == 2 and tensor.stride(-1) == 1
    room = [0] * (5 - tensor.ndim)
    sizes, strides = tensor.shape[::-1], tensor.stride()[::-1]
    box = (64, *tile[::-1])
    arrays = (
        (ctypes.c_int * 5)(*box, *room),
        (ctypes.c_uint64 * 5)(*sizes, *room),
        (ctypes.c_uint64 * 5)(*strides, *room),
    )
    return _Tensor(tensor.data_ptr(), tensor.ndim, *arrays)


class EmulatedLibrary:
    """Stands for kernels.launcher.KernelLibrary. A module is compiled when it is first launched; those of `ahead` at once.

    Every launch has another order of threads, warps and blocks; `seed` decides which.
    """

    def __init__(
        self,
        builder: Builder,
        specs: Mapping[str, KernelSpec],
        ahead: Collection[str] = (),
        mutation: Mutation | None = None,
        seed: int = 0,
        more: Path | None = None,
    ) -> None:
        """`more`: a directory of sources beside those of kernels/."""
        self._builder = builder
        self._more = more
        self._specs = specs
        self._mutation = mutation
        self._modules: dict[str, Future[ctypes.CDLL]] = {}
        self._shared: dict[tuple[str, str], int] = {}
        self.seed = seed
        self.previous: Callable[[bool], None] | None = None
        """Called by kernels that look at it: with False where a block begins, and with True at its wait for the kernel before it."""
        for module in ahead:
            self._start(module)

    def __contains__(self, module: str) -> bool:
        return module in self._specs

    def allow_shared(self, module: str, kernel: str, shared_bytes: int) -> None:
        """Let the kernel use so many bytes of dynamic shared memory."""
        assert kernel in self._specs[module].kernels
        self._shared[module, kernel] = shared_bytes

    def launch(
        self,
        stream: Stream,
        module: str,
        kernel: str,
        grid: tuple[int, ...],
        block: int,
        *arguments: Argument,
        shared_bytes: int = 0,
    ) -> None:
        """Run a kernel to its end. Raises EmulatorError, and BuildError where its source does not compile."""
        if 0 in grid:
            return
        if shared_bytes > max(_UNASKED_SHARED, self._shared.get((module, kernel), 0)):
            raise EmulatorError(f"{kernel}: {shared_bytes} bytes of dynamic shared memory were not asked for")
        started = self._start(module).result()
        entry: Any = getattr(started, f"emulate_{kernel}")
        entry.restype = ctypes.c_char_p
        scalars = [ctypes.c_uint64(a) if isinstance(a, int) else a for a in arguments]
        kinds = "".join(_kind(argument) for argument in arguments)
        pointers = (ctypes.c_void_p * len(scalars))(*(ctypes.addressof(scalar) for scalar in scalars))
        sizes = (ctypes.c_int * 3)(*grid, *[1] * (3 - len(grid)))
        raised: list[BaseException] = []
        previous = _Previous() if self.previous is None else _Previous(_kept(self.previous, raised))
        self.seed += 1
        launch = _Launch(sizes, block, shared_bytes, self.seed, len(scalars), pointers, kinds.encode(), previous)
        error = entry(ctypes.byref(launch))
        if raised:
            raise raised[0]
        if error is not None:
            raise EmulatorError(error.decode())
        if broken := broken_guards():
            raise EmulatorError(f"{kernel}: wrote {broken}")

    def _start(self, module: str) -> Future[ctypes.CDLL]:
        if module not in self._modules:
            self._modules[module] = self._builder.start(self._specs[module], self._mutation, self._more)
        return self._modules[module]


def _kind(argument: Argument) -> str:
    if isinstance(argument, int):
        return "p"
    if isinstance(argument, ctypes.c_float):
        return "f"
    if isinstance(argument, _Tensor):
        return "m"
    assert isinstance(argument, ctypes.c_int)
    return "i"


def _kept(previous: Callable[[bool], None], raised: list[BaseException]) -> Callable[[int], None]:
    """What is raised in a callback would be printed and forgotten."""

    def call(ended: int) -> None:
        try:
            previous(bool(ended))
        except BaseException as error:  # noqa: BLE001 (raised again behind the launch)
            raised.append(error)

    return call


class EmulatedOps(KernelOps):
    """The operations of a model on CPU tensors, as on a device of `multiprocessors` of compute capability 8.0, or on a Hopper chip."""

    def __init__(
        self,
        builder: Builder,
        shape: KernelShape,
        ahead: Collection[str] = (),
        mutation: Mutation | None = None,
        multiprocessors: int = 3,
        seed: int = 0,
        clusters: bool = False,
        hopper: bool = False,
    ) -> None:
        """`clusters`: a row with top_k, top_p or min_p is shared by a cluster of blocks, as from compute capability 9.0 on. `hopper`:
        what has wgmma takes it, whatever the table of products says."""
        specs = kernel_specs(shape, 8, WGMMA_ARCHITECTURE if hopper else "sm_80")
        if hopper:
            specs |= {tile.name: gemm_spec(tile, {}) for tile in GEMM_TILES}
        if clusters:
            specs["truncated_sample-cluster"] = truncated_spec("sm_90a", clustered=True)
        # On Hopper only, behind prefix_attention; else what that leaves is made otherwise.
        self._hopper = hopper
        names = ("HEADS", "KV_HEADS", "HEAD_DIM", "BLOCK_SIZE")
        heads = {name: specs["decode_attention"].definitions[name] for name in names}
        specs["decode_attention-prefix"] = decode_spec(
            shape, False, specs["decode_attention"].definitions["BLOCKS"], heads, after_prefix=True
        )
        self.emulator = EmulatedLibrary(builder, specs, ahead, mutation, seed)
        super().__init__(cast(KernelLibrary, self.emulator), shape, cast(Stream, None), multiprocessors, 8)

    def _tile_map(self, tensor: Tensor, *tile: int) -> _Tensor:
        return emulated_map(tensor, *tile)

    @property
    def shares_prefixes(self) -> bool:
        return True

    def prefix_attention(
        self, qkv: Tensor, cache: Tensor, step: StepTensors, shared: SharedPrefixes, scratch: DecodeScratch
    ) -> None:
        """The operation; or, where there is no wgmma, what it leaves, in float64."""
        if self._hopper:
            super().prefix_attention(qkv, cache, step, shared, scratch)
            return
        shape = self._shape
        group = shape.num_heads // shape.num_kv_heads
        slots = scratch.partials.view(-1, shape.num_heads, shape.head_dim + 2)
        for row, begin, end, tile, first, rows, slot, stride in shared.works[: int(shared.num_works)].tolist():
            if tile:
                continue  # all tiles of a part are done with its first one
            blocks = step.block_table[row, begin // shape.block_size : end // shape.block_size].long()
            keys, values = (
                part[blocks].transpose(1, 2).flatten(0, 1).double().repeat_interleave(group, 1) for part in cache
            )
            for i, token in enumerate(shared.query_tokens[first : first + rows].tolist()):
                query = qkv[token, : shape.q_size].view(shape.num_heads, -1).double()
                scores = torch.einsum("hd,khd->hk", query, keys) * self._scale.value
                maximum = scores.amax(1)
                weights = torch.exp2(scores - maximum[:, None])
                mine = slots[slot + i * stride]
                mine[:, :-2] = torch.einsum("hk,khd->hd", weights, values)
                mine[:, -2], mine[:, -1] = maximum, weights.sum(1)

    def decode_attention(
        self,
        qkv: Tensor,
        cache: Tensor,
        step: StepTensors,
        work: DecodeItems,
        scratch: DecodeScratch,
        out: Tensor,
        rows: int,
        after_prefix: bool = False,
    ) -> None:
        """The operation, with NaN where the kernel before it has not written yet: queries, newest tokens, results of prefixes."""
        newest = step.context_lens.long() - 1
        blocks = step.block_table[step.rows.long(), newest // self._shape.block_size].long()
        places = (slice(None), blocks, slice(None), newest % self._shape.block_size)
        tokens, queries = cache[places].clone(), qkv.clone()
        results = scratch.partials[len(work.items) :]
        prefixes = results.clone()

        def previous(ended: bool) -> None:
            cache[places] = tokens if ended else torch.nan
            qkv.copy_(queries) if ended else qkv.fill_(torch.nan)
            results.copy_(prefixes) if ended else results.fill_(torch.nan)

        self.emulator.previous = previous
        try:
            super().decode_attention(qkv, cache, step, work, scratch, out, rows, after_prefix)
        finally:
            self.emulator.previous = None
            previous(True)
