"""Loaded kernels and how to start them on a stream.

`KernelLibrary` compiles a model's kernels (several at once), loads the cubins into the current context and launches them by name.
Arguments are plain: an int is a device address or a 64-bit number, `Int` and `Float` are 32-bit scalars; beside them
descriptors of tensor_map.py.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeAlias

from cuda.bindings import driver
from cuda.core import Kernel, LaunchConfig, ObjectCode, Stream, launch

from kernels.compiler import CompiledModule, Compiler
from kernels.shapes import KernelSpec

log = logging.getLogger("octavo.kernels")

Int = ctypes.c_int
Float = ctypes.c_float
TensorMap: TypeAlias = Any
Argument: TypeAlias = int | ctypes.c_int | ctypes.c_float | TensorMap


class LaunchError(Exception):
    """The driver refused to load, configure or launch a kernel."""


class KernelLibrary:
    """Kernels of one device. Owned by one backend; loading needs its context to be current."""

    def __init__(self, compiler: Compiler, specs: Mapping[str, KernelSpec], device: int, overlap: bool) -> None:
        """`overlap`: launch with programmatic dependent launch (sm_90 and later)."""
        started = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            modules = dict(
                zip(specs, pool.map(lambda s: compiler.compile(s.source, s.definitions), specs.values()), strict=True)
            )
        self._modules: dict[str, ObjectCode] = {}
        self._kernels: dict[tuple[str, str], Kernel] = {}
        self._device = device
        self._overlap = overlap
        for name, module in modules.items():
            self._load(name, module, specs[name].kernels)
        cached = sum(module.cached for module in modules.values())
        log.info(
            "%d kernel modules for %s in %.2f s, %d from the cache",
            len(modules),
            compiler.architecture,
            time.perf_counter() - started,
            cached,
        )

    def __contains__(self, module: str) -> bool:
        return module in self._modules

    def allow_shared(self, module: str, kernel: str, shared_bytes: int) -> None:
        """Let the kernel use so much dynamic shared memory; by default all of it ends at 48 KiB. Raises LaunchError."""
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle = self._kernels[module, kernel].handle
        (error,) = driver.cuKernelSetAttribute(attribute, shared_bytes, handle, driver.CUdevice(self._device))
        if error != driver.CUresult.CUDA_SUCCESS:
            raise LaunchError(f"{kernel}: {shared_bytes} bytes of shared memory: {error.name}")

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
        """Enqueue a kernel. An empty grid launches nothing."""
        if 0 in grid:
            return
        config = _config(grid, block, shared_bytes, self._overlap)
        try:
            launch(stream, config, self._kernels[module, kernel], *arguments)
        except Exception as error:
            # cuda.core's error types are not part of its documented API; whatever it raises, the launch did not happen.
            raise LaunchError(f"{kernel}: {error}") from error

    def _load(self, name: str, module: CompiledModule, kernels: tuple[str, ...]) -> None:
        code: Any = ObjectCode.from_cubin(module.cubin, name=name)
        self._modules[name] = code
        for kernel in kernels:
            self._kernels[name, kernel] = code.get_kernel(kernel)


@lru_cache(maxsize=4096)
def _config(grid: tuple[int, ...], block: int, shared_bytes: int, overlap: bool) -> LaunchConfig:
    return LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes, programmatic_stream_serialization=overlap)
